"""Shape of a BEATs model (arXiv:2212.09058) and the features that it takes.

Legend: ``T`` frames, ``M`` mel bins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llava_scale.errors import CheckpointError, ConfigError, suggest
from llava_scale.towers.audio_base import AudioFrontend
from llava_scale.towers.fbank import Fbank

FBANK_MEAN = 15.41663
FBANK_STD = 6.55582

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_accurate": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatsConfig:
    """Shape of a BEATs model, field by field as in the ``cfg`` of official checkpoints.

    Fields without a default decide what the weights mean: a model built with another ``deep_norm`` loads them without
    complaint and computes noise, so they are never guessed.
    """

    encoder_layers: int
    encoder_embed_dim: int
    encoder_ffn_embed_dim: int
    encoder_attention_heads: int
    embed_dim: int
    layer_norm_first: bool
    deep_norm: bool
    conv_bias: bool
    conv_pos: int
    conv_pos_groups: int
    relative_position_embedding: bool
    num_buckets: int
    max_distance: int
    gru_rel_pos: bool
    input_patch_size: int = 16
    activation_fn: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    encoder_layerdrop: float = 0.0
    dropout_input: float = 0.0
    layer_wise_gradient_decay_ratio: float = 1.0
    finetuned_model: bool = False
    predictor_dropout: float = 0.0
    predictor_class: int = 527
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else a checkpoint's ``cfg`` holds; kept, not used."""

    def __post_init__(self) -> None:
        if self.encoder_embed_dim % self.encoder_attention_heads:
            raise ConfigError(
                f"encoder_embed_dim {self.encoder_embed_dim} is no multiple of {self.encoder_attention_heads} heads"
            )
        if self.activation_fn not in ACTIVATIONS:
            raise ConfigError(
                f"unknown activation_fn {self.activation_fn!r}; {suggest(self.activation_fn, ACTIVATIONS)}"
            )
        if self.deep_norm and self.layer_norm_first:
            raise ConfigError("deep_norm and layer_norm_first contradict each other")
        if self.gru_rel_pos and not self.relative_position_embedding:
            raise ConfigError("gru_rel_pos needs relative_position_embedding")

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> BeatsConfig:
        """Read the ``cfg`` of a checkpoint; fields that are not known go to ``extra``.

        Raises:
            CheckpointError: a field is missing that the meaning of the weights hangs on.
        """
        names = {item.name for item in fields(cls)} - {"extra"}
        known = {name: value for name, value in cfg.items() if name in names}
        extra = {name: value for name, value in cfg.items() if name not in names}
        try:
            return cls(**known, extra=extra)
        except TypeError as error:
            raise CheckpointError(f"the cfg of the BEATs checkpoint is incomplete: {error}") from None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.encoder_embed_dim // self.encoder_attention_heads


@dataclass(frozen=True, slots=True)
class BeatsFrontend(AudioFrontend):
    """16 kHz sound to normalised filter banks ``(T, 128)``.

    Attributes:
        window_samples: Samples of a window; the model was trained on 10 s.
        patch_size: Frames and mel bins of a patch.
        bank: The filter bank.
    """

    window_samples: int = 160_000
    patch_size: int = 16
    bank: Fbank = field(default_factory=Fbank)

    def __post_init__(self) -> None:
        if self.bank.num_bins % self.patch_size or self.window_samples < self.min_samples:
            raise ConfigError(
                f"BEATs takes windows of {self.min_samples} samples or more and mel bins in multiples of "
                f"{self.patch_size}, got {self}"
            )

    @property
    def sample_rate(self) -> int:  # type: ignore[override]
        """16 kHz."""
        return self.bank.sample_rate

    @property
    def min_samples(self) -> int:  # type: ignore[override]
        """Samples of one row of patches: 2,800 (0.175 s)."""
        return self.bank.frame_size + (self.patch_size - 1) * self.bank.shift_size

    def features(self, wave: Tensor) -> Tensor:
        """Normalised filter bank ``(T, M)`` of one window."""
        return (self.bank(wave) - FBANK_MEAN) / (2 * FBANK_STD)

    def window_tokens(self, lengths: Tensor) -> Tensor:
        """Eight patches for each 16 frames that are wholly sound."""
        frames = 1 + (lengths - self.bank.frame_size).div(self.bank.shift_size, rounding_mode="floor")
        rows = frames.div(self.patch_size, rounding_mode="floor").clamp(min=0)
        return rows * (self.bank.num_bins // self.patch_size)

    def fingerprint(self) -> str:
        """Settings of windows and filter bank."""
        return repr(self)
