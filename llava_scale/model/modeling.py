"""The model: tower, projector, splice, language model, loss.

Legend: ``B`` rows, ``S`` tokens in a row, ``I`` pictures, ``N`` tokens of a picture, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from llava_scale.compressors import Projector, build_projector
from llava_scale.errors import ConfigError, ShapeError
from llava_scale.model.attention import PACKED, PackedLayout, packed_pass
from llava_scale.model.configuration import CustomVisionConfig, LlavaScaleConfig
from llava_scale.model.head import LogitHead
from llava_scale.model.loss import LOSS_CHUNK, next_token_targets, summed_cross_entropy
from llava_scale.model.splice import check_count, splice
from llava_scale.towers import (
    CustomVisionTower,
    PixelNormalizer,
    TransformersVisionTower,
    VisionTower,
    restore_constants,
)


@dataclass
class LlavaScaleOutput(ModelOutput):
    """What a forward pass gives.

    Attributes:
        loss: Scalar, nats; where ``labels`` were given.
        logits: ``(B, S, V)``; None in training with labels and for packed rows with labels, where they are not made.
        past_key_values: Keys and values so far, where a cache is used.
        hidden_states: Of the language model, where asked for.
        attentions: Of the language model, where asked for.
        image_hidden_states: ``(I, N, D)`` projected picture tokens, where pictures were given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class LlavaScaleForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A vision tower, a projector and a causal language model as one model of transformers.

    Args:
        config: What it is put together from.
        vision_tower: Tower with weights; a fresh one if None.
        language_model: Language model with weights; a fresh one if None.
    """

    config_class = LlavaScaleConfig
    config: LlavaScaleConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("past_key_values",)

    def __init__(
        self,
        config: LlavaScaleConfig,
        *,
        vision_tower: VisionTower | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        # "packed" is sdpa for everything but packed rows; any other choice of the user's stands.
        if config.text_config._attn_implementation in (None, "sdpa"):
            config.text_config._attn_implementation = PACKED
        self.vision_tower = vision_tower or build_tower(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.projector = build_projector(
            config.projector["type"],
            self.vision_tower.hidden_size,
            config.text_config.hidden_size,
            input_norm=config.projector["input_norm"],
        )
        self.head = LogitHead(config.text_config)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_chunk: int = LOSS_CHUNK,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LlavaScaleOutput:
        """Loss, logits, or both, of text with pictures in it.

        Args:
            input_ids: ``(B, S)``; each picture's placeholder repeated to its number of tokens.
            attention_mask: ``(B, S)``, 0 on padding; never with ``cu_seq_lens``.
            position_ids: ``(B, S)``; restarting at 0 with each sample of a packed row.
            past_key_values: Cache of earlier tokens.
            inputs_embeds: ``(B, S, D)`` instead of ``input_ids``, for text alone.
            labels: ``(B, S)``, not shifted, -100 where unsupervised. They may stay on the CPU, which saves a wait
                for the accelerator.
            pixel_values: ``(I, 3, H, W)`` all pictures in order of appearance; uint8, or float if normalised.
            pixel_values_videos: ``(F, 3, H, W)`` frames of all videos in order of appearance.
            cu_seq_lens: ``(K + 1,)`` offsets of the samples in a packed row; B is then 1. May stay on the CPU.
            num_items_in_batch: Divides the summed loss; the mean over the supervised tokens here if None.
            loss_chunk: Supervised positions whose logits are held at once.
            use_cache: Whether keys and values are kept; never with ``cu_seq_lens``.
            logits_to_keep: Last positions, or chosen ones, whose logits are returned; 0 for all.
            **kwargs: For the language model.

        Raises:
            ShapeError: placeholders and media do not match, or the packed row is not laid out as promised.
        """
        embeds, images = self.embed(input_ids, inputs_embeds, pixel_values, pixel_values_videos, past_key_values)
        targets = None if labels is None else next_token_targets(labels, cu_seq_lens)
        decoded = self.decode(
            embeds,
            cu_seq_lens,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = decoded.last_hidden_state
        loss = logits = None
        if targets is not None:
            loss = self.loss(hidden, *targets, num_items_in_batch, loss_chunk) + self._touch(images)
        if targets is None or not (self.training or cu_seq_lens is not None):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.logits(hidden[:, kept])
        return LlavaScaleOutput(
            loss=loss,
            logits=logits,
            past_key_values=decoded.get("past_key_values"),
            hidden_states=decoded.get("hidden_states"),
            attentions=decoded.get("attentions"),
            image_hidden_states=images,
        )

    def embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Text embeddings with the media in their places, ``(B, S, D)``, and the pictures' tokens ``(I, N, D)``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("give exactly one of input_ids and inputs_embeds")
        if input_ids is None:
            if pixel_values is not None or pixel_values_videos is not None:
                raise ShapeError("pictures and videos need input_ids, whose placeholders say where they go")
            assert inputs_embeds is not None
            return inputs_embeds, None
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        images = None if pixel_values is None else self.get_image_features(pixel_values)
        frames = None if pixel_values_videos is None else self.get_image_features(pixel_values_videos)
        prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        for kind, media in (("image", images), ("video", frames)):
            placeholder_id = getattr(self.config, f"{kind}_token_id")
            if media is not None:
                embeds = splice(embeds, input_ids, placeholder_id, media.flatten(0, 1), kind=kind)
            elif prefill and input_ids.device.type == "cpu":
                check_count((input_ids == placeholder_id).sum(), 0, kind=kind)
        return embeds, images

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Tokens ``(I, N, D)`` of pictures ``(I, 3, H, W)``, in the language model's width."""
        tower_trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with nullcontext() if tower_trains else torch.no_grad():
            features = self.vision_tower(pixel_values)
        tokens: Tensor = self.projector(features)
        return tokens

    def decode(
        self, embeds: Tensor, cu_seq_lens: Tensor | None, *, attention_mask: Tensor | None, **kwargs: Any
    ) -> ModelOutput:
        """Hidden states of the language model without its head; samples of a packed row see only themselves."""
        decoder = self.language_model.base_model
        if cu_seq_lens is None:
            if self.training and kwargs.get("use_cache") is None:
                kwargs["use_cache"] = False
            return decoder(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None or kwargs.pop("use_cache") or kwargs.pop("past_key_values") is not None:
            raise ConfigError("packed rows (cu_seq_lens) take no attention_mask and no cache")
        if kwargs["position_ids"] is None:
            raise ShapeError("packed rows (cu_seq_lens) need position_ids that restart with each sample")
        layout = PackedLayout.of(cu_seq_lens, row_length=embeds.shape[1], device=embeds.device)
        implementation = self.config.text_config._attn_implementation
        with packed_pass(implementation=implementation):
            return decoder(inputs_embeds=embeds, use_cache=False, **layout.attention_kwargs(implementation), **kwargs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token over the vocabulary, as the language model itself makes them."""
        return self.head(hidden, self.language_model.get_output_embeddings())

    def loss(
        self, hidden_BSD: Tensor, positions: Tensor, targets: Tensor, num_items: Tensor | int | None, chunk: int
    ) -> Tensor:
        """Summed cross-entropy of ``targets`` at ``positions`` of the flattened rows, over ``num_items``."""
        device = hidden_BSD.device
        supervised = hidden_BSD.flatten(0, 1).index_select(0, positions.to(device, non_blocking=True))
        total = summed_cross_entropy(supervised, targets.to(device, non_blocking=True), self.logits, chunk=chunk)
        if num_items is None:
            num_items = max(targets.shape[0], 1)
        return total / (num_items.to(device) if isinstance(num_items, Tensor) else num_items)

    def _touch(self, images: Tensor | None) -> Tensor | float:
        """Zero that depends on every trainable modality parameter that this pass has not used.

        Ranks whose rows hold text only then still take part in every gradient exchange, at no cost.
        """
        unused = [] if images is not None or not torch.is_grad_enabled() else self._modality_parameters()
        return sum((0.0 * parameter.flatten()[:1].sum() for parameter in unused if parameter.requires_grad), 0.0)

    def _modality_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.vision_tower.parameters()
        yield from self.projector.parameters()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        is_first_iteration: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step of ``generate``; pictures only go in while the cache does not hold them yet."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        if is_first_iteration or not use_cache:
            inputs["pixel_values"] = pixel_values
            inputs["pixel_values_videos"] = pixel_values_videos
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each row for beams and several answers, with all of its pictures behind each copy."""
        media = {name: kwargs.pop(name, None) for name in ("pixel_values", "pixel_values_videos")}
        if expand_size > 1 and input_ids is not None:
            ids = {"pixel_values": self.config.image_token_id, "pixel_values_videos": self.config.video_token_id}
            for name, pixels in media.items():
                if pixels is not None:
                    per_row = (input_ids == ids[name]).sum(1) // self.vision_tower.num_tokens
                    copies = [part for part in pixels.split(per_row.tolist()) for _ in range(expand_size)]
                    media[name] = torch.cat(copies)
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, **media}

    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights of our own parts; each transformers model inside draws its own."""
        if isinstance(module, Projector):
            module.reset_parameters()
        elif isinstance(module, PixelNormalizer):
            module.reset_buffers()
        else:
            restore_constants(module)

    def get_input_embeddings(self) -> nn.Module:
        """Embeddings of the language model."""
        return self.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embeddings of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Head of the language model."""
        return self.language_model.get_output_embeddings()  # type: ignore[no-any-return]

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head of the language model."""
        self.language_model.set_output_embeddings(value)

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Language model without its head."""
        return self.language_model.base_model  # type: ignore[no-any-return]


def build_tower(config: LlavaScaleConfig, model: PreTrainedModel | None = None) -> VisionTower:
    """Vision tower that ``config`` describes, around ``model`` if given, else with fresh weights."""
    pictures: dict[str, Any] = {
        "image_size": config.image_size,
        "image_mean": config.image_mean,
        "image_std": config.image_std,
        "feature_select": config.vision_feature_select,
    }
    if isinstance(config.vision_config, CustomVisionConfig):
        return CustomVisionTower(config.vision_config.import_path, config.vision_config.arguments, **pictures)
    return TransformersVisionTower(
        config.vision_config, feature_layer=config.vision_feature_layer, model=model, **pictures
    )
