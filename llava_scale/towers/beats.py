"""BEATs (arXiv:2212.09058): audio spectrogram transformer with gated relative positions.

Own implementation that loads the official checkpoints, pre-trained and fine-tuned, under their own parameter names. The
relative position table, which official files store once per layer but share, is held by the first layer alone.

Legend: ``B`` clips, ``S`` samples, ``T`` frames, ``M`` mel bins, ``N`` tokens, ``D`` width, ``H`` heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_scale.errors import ConfigError, ShapeError
from llava_scale.towers.audio_base import AudioTower, tokens_valid
from llava_scale.towers.beats_config import ACTIVATIONS, BeatsConfig, BeatsFrontend


class Beats(nn.Module):
    """Patches, convolutional positions and transformer; parameter names are those of official checkpoints."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.config = config
        size, width = config.input_patch_size, config.encoder_embed_dim
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, size, stride=size, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj = nn.Linear(config.embed_dim, width) if config.embed_dim != width else None
        self.dropout_input = nn.Dropout(config.dropout_input)
        self.encoder = _Encoder(config)
        self.predictor = nn.Linear(width, config.predictor_class) if config.finetuned_model else None

    def forward(self, features_BTM: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        """Features ``(B, N, D)`` of normalised filter banks; tokens run over time, within it over frequency.

        Args:
            features_BTM: As ``BeatsFrontend`` makes them; frames behind the last whole patch are not used.
            valid_BN: Tokens that are sound; None if all are. Others neither count nor are attended to.

        Raises:
            ShapeError: fewer frames or mel bins than one patch.
        """
        size = self.config.input_patch_size
        if features_BTM.ndim != 3 or min(features_BTM.shape[1:]) < size:
            raise ShapeError(f"features must be (clips, frames, bins) of {size} or more, got {features_BTM.shape}")
        patches = self.patch_embedding(features_BTM.to(self.patch_embedding.weight.dtype)[:, None])
        x = self.layer_norm(patches.flatten(2).transpose(1, 2))
        if self.post_extract_proj is not None:
            x = self.post_extract_proj(x)
        return cast(Tensor, self.encoder(self.dropout_input(x), valid_BN))

    def probabilities(self, features_BTM: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        """Probability of each class ``(B, classes)`` that a fine-tuned checkpoint was trained on.

        Raises:
            ConfigError: the checkpoint is not fine-tuned.
        """
        if self.predictor is None:
            raise ConfigError("this BEATs checkpoint is only pre-trained and has no classes")
        x = self(features_BTM, valid_BN)
        logits = self.predictor(functional.dropout(x, self.config.predictor_dropout, self.training))
        if valid_BN is None:
            return torch.sigmoid(logits.mean(dim=1))
        total = logits.masked_fill(~valid_BN[..., None], 0).sum(dim=1)
        return torch.sigmoid(total / valid_BN.sum(dim=1, keepdim=True))


class _Encoder(nn.Module):
    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.config = config
        self.pos_conv = nn.Sequential(_PositionConv(config))
        self.layers = nn.ModuleList([_Layer(config, first=i == 0) for i in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(config.encoder_embed_dim)
        self.apply(_init_weights)
        if config.deep_norm:
            for layer in self.layers:
                _init_deep_norm(cast(_Layer, layer), gain=(8 * config.encoder_layers) ** -0.25)

    def forward(self, x_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
        config = self.config
        if valid_BN is not None:
            x_BND = x_BND.masked_fill(~valid_BN[..., None], 0)
        x = x_BND + functional.gelu(self.pos_conv(x_BND.transpose(1, 2))).transpose(1, 2)
        if not config.layer_norm_first:
            x = self.layer_norm(x)
        x = functional.dropout(x, config.dropout, self.training)
        bias = cast(_Layer, self.layers[0]).self_attn.position_bias(x.shape[1])
        hidden = None if valid_BN is None else _hidden_keys(valid_BN, x.dtype)
        for layer in self.layers:
            if config.layer_wise_gradient_decay_ratio != 1.0:
                x = _scale_gradient(x, config.layer_wise_gradient_decay_ratio)
            if self.training and torch.rand(()) < config.encoder_layerdrop:
                continue
            x = layer(x, bias, hidden)
        return self.layer_norm(x) if config.layer_norm_first else x


class _PositionConv(nn.Module):
    """Grouped convolution along the tokens, its weight normalised per tap."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width, self.taps, self.groups = config.encoder_embed_dim, config.conv_pos, config.conv_pos_groups
        weight = torch.empty(width, width // self.groups, self.taps)
        nn.init.normal_(weight, std=math.sqrt(4 * (1 - config.dropout) / (self.taps * width)))
        self.bias = nn.Parameter(torch.zeros(width))
        self.weight_g = nn.Parameter(weight.norm(dim=(0, 1), keepdim=True))
        self.weight_v = nn.Parameter(weight)

    def forward(self, x_BDN: Tensor) -> Tensor:
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        x = functional.conv1d(x_BDN, weight, self.bias, padding=self.taps // 2, groups=self.groups)
        return x[..., : x_BDN.shape[-1]]  # an even number of taps gives one too many


class _Layer(nn.Module):
    def __init__(self, config: BeatsConfig, *, first: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.config = config
        self.residual_scale = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0
        self.self_attn = _Attention(config, first=first)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor | None, hidden: Tensor | None) -> Tensor:
        if self.config.layer_norm_first:
            x = x + self._attend(self.self_attn_layer_norm(x), bias, hidden)
            return x + self._transform(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x * self.residual_scale + self._attend(x, bias, hidden))
        return cast(Tensor, self.final_layer_norm(x * self.residual_scale + self._transform(x)))

    def _attend(self, x: Tensor, bias: Tensor | None, hidden: Tensor | None) -> Tensor:
        return functional.dropout(self.self_attn(x, bias, hidden), self.config.dropout, self.training)

    def _transform(self, x: Tensor) -> Tensor:
        config = self.config
        x = ACTIVATIONS[config.activation_fn](self.fc1(x))
        x = self.fc2(functional.dropout(x, config.activation_dropout, self.training))
        return functional.dropout(x, config.dropout, self.training)


class _Attention(nn.Module):
    """Self-attention with a position bias that each query gates (WavLM, arXiv:2110.13900 §3.2)."""

    def __init__(self, config: BeatsConfig, *, first: bool) -> None:
        super().__init__()
        width, heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.config = config
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        has_table = first and config.relative_position_embedding
        self.relative_attention_bias = nn.Embedding(config.num_buckets, heads) if has_table else None
        if config.gru_rel_pos:
            self.grep_linear = nn.Linear(config.head_dim, 8)
            self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def position_bias(self, num_tokens: int) -> Tensor | None:
        """``(H, N, N)``, the same for all layers; None without relative positions."""
        if self.relative_attention_bias is None:
            return None
        config, table = self.config, self.relative_attention_bias.weight
        distances = torch.arange(1 - num_tokens, num_tokens, device=table.device)
        buckets = relative_buckets(distances, num_buckets=config.num_buckets, max_distance=config.max_distance)
        places = torch.arange(num_tokens, device=table.device)
        of_pair = places[None] - places[:, None] + num_tokens - 1
        return functional.embedding(buckets, table).T[:, of_pair]

    def forward(self, x_BND: Tensor, bias: Tensor | None, hidden: Tensor | None) -> Tensor:
        batch, num_tokens, width = x_BND.shape
        shape = (batch, num_tokens, self.config.encoder_attention_heads, self.config.head_dim)
        query, key, value = (
            projection(x_BND).view(shape).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = self._gated(query, bias, hidden)
        dropout = self.config.attention_dropout if self.training else 0.0
        x = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return cast(Tensor, self.out_proj(x.transpose(1, 2).reshape(batch, num_tokens, width)))

    def _gated(self, query_BHNd: Tensor, bias: Tensor | None, hidden: Tensor | None) -> Tensor | None:
        """What is added to the attention logits: ``bias (H, N, N)`` times a gate per query, ``hidden (B, 1, 1, N)``."""
        if bias is None:
            return hidden
        if not self.config.gru_rel_pos:
            return bias[None] if hidden is None else bias + hidden
        # The official gates are sums of four outputs each; summing the weights is the same for a quarter of the work.
        weight = self.grep_linear.weight.view(2, 4, -1).sum(1)
        gates = functional.linear(query_BHNd, weight, self.grep_linear.bias.view(2, 4).sum(1)).sigmoid()
        update, reset = torch.split(gates, 1, dim=-1)
        gate = update * (reset * self.grep_a - 1.0) + 2.0
        return gate * bias if hidden is None else torch.addcmul(hidden, gate, bias)


class _ScaleGradient(torch.autograd.Function):
    """The identity whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


class BeatsTower(AudioTower):
    """BEATs as an audio tower: normalised filter banks of windows to features.

    Args:
        config: Shape of the model; weights are random until loaded.
        window_seconds: Longest window; relative positions saturate at about 16 s.
        labels: Names of the classes of a fine-tuned checkpoint.
    """

    def __init__(self, config: BeatsConfig, *, window_seconds: float = 10.0, labels: Mapping[int, str] | None = None):
        super().__init__()
        self.frontend = BeatsFrontend(round(window_seconds * 16_000), config.input_patch_size)
        self.hidden_size = config.encoder_embed_dim
        self.labels = dict(labels or {})
        self.model = Beats(config)

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features and which are real; padding changes nothing, unlike with the official mask."""
        frontend = cast(BeatsFrontend, self.frontend)
        across = frontend.bank.num_bins // frontend.patch_size
        valid = tokens_valid(frontend.window_tokens(lengths), values.shape[1] // frontend.patch_size * across)
        return self.model(values, valid), valid


def relative_buckets(distances: Tensor, *, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance (key minus query): exact near zero, logarithmic up to ``max_distance``, then the last.

    Half of the buckets are for keys behind the query, as in T5 (arXiv:1910.10683 §2.1).
    """
    half = num_buckets // 2
    exact = half // 2
    far = distances.abs()
    scaled = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    logarithmic = (exact + scaled.to(torch.long)).clamp(max=half - 1)
    return (distances > 0).to(torch.long) * half + torch.where(far < exact, far, logarithmic)


def official_valid_tokens(padding_BS: Tensor, num_frames: int, num_tokens: int) -> Tensor:
    """Tokens that the official code takes for sound, ``(B, num_tokens)``, from its mask of padded samples.

    It divides samples evenly over frames and frames over tokens, so it keeps some tokens of padding. For comparison
    with models that were trained that way; ``BeatsTower`` counts exactly.
    """
    for number in (num_frames, num_tokens):
        usable = padding_BS.shape[1] - padding_BS.shape[1] % number
        padding_BS = padding_BS[:, :usable].view(len(padding_BS), number, -1).all(-1)
    return ~padding_BS


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    return cast(Tensor, _ScaleGradient.apply(x, scale))  # type: ignore[no-untyped-call]


def _hidden_keys(valid_BN: Tensor, dtype: torch.dtype) -> Tensor:
    """0 for keys that count, minus infinity for others; a clip without any attends to all, to stay finite."""
    counts = valid_BN | ~valid_BN.any(dim=1, keepdim=True)
    hidden = torch.zeros(valid_BN.shape, dtype=dtype, device=valid_BN.device)
    return hidden.masked_fill_(~counts, -math.inf)[:, None, None]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def _init_deep_norm(layer: _Layer, gain: float) -> None:
    """Initial scales of arXiv:2203.00555, table 2."""
    attention = layer.self_attn
    for linear in (attention.q_proj, attention.k_proj):
        nn.init.xavier_normal_(linear.weight)
    for linear in (attention.v_proj, attention.out_proj, layer.fc1, layer.fc2):
        nn.init.xavier_normal_(linear.weight, gain=gain)
