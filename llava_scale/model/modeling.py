"""The model: tower, compressor, projector, splice, language model, loss.

Legend: ``B`` rows, ``S`` tokens in a row, ``I`` pictures, ``N`` tokens of a picture, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from llava_scale.compressors import STC, Projector, QueryCompressor, build_projector
from llava_scale.errors import ConfigError, ShapeError
from llava_scale.model.attention import PACKED, PackedLayout, packed_pass
from llava_scale.model.audible import AudioPath
from llava_scale.model.configuration import CustomVisionConfig, LlavaScaleConfig
from llava_scale.model.generating import MediaGeneration
from llava_scale.model.head import LogitHead
from llava_scale.model.loss import LOSS_CHUNK, next_token_targets, summed_cross_entropy
from llava_scale.model.splice import check_count, splice
from llava_scale.model.visual import MediaInputs, VisualPath, compressor_section
from llava_scale.towers import (
    CustomVisionTower,
    PixelNormalizer,
    TransformersVisionTower,
    VisionTower,
    restore_constants,
)
from llava_scale.towers.instruction import InstructionTower
from llava_scale.types import AudioFeatures

if TYPE_CHECKING:
    from llava_scale.towers.audio_base import AudioTower
    from llava_scale.towers.instruction import Encoded
    from llava_scale.types import Grid


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


class LlavaScaleForConditionalGeneration(MediaGeneration, VisualPath, AudioPath, PreTrainedModel, GenerationMixin):
    """Vision and audio towers, compressors, projectors and a causal language model as one model of transformers.

    Args:
        config: What it is put together from.
        vision_tower: Tower with weights; a fresh one if None.
        language_model: Language model with weights; a fresh one if None.
        instruction_tower: Reader of questions with weights; a fresh one if None and ``config`` asks for one.
        audio_tower: Audio tower with weights; a fresh one if None and ``config`` asks for one.

    Attributes:
        question_encoder: Questions to token ids and mask, set by ``build_model`` and ``load_model``; only packed rows,
            which carry questions as text, need it.
    """

    config_class = LlavaScaleConfig
    config: LlavaScaleConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "audio", "text")
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
        instruction_tower: InstructionTower | None = None,
        audio_tower: AudioTower | None = None,
    ) -> None:
        super().__init__(config)
        # "packed" is sdpa for everything but packed rows; any other choice of the user's stands.
        if config.text_config._attn_implementation in (None, "sdpa"):
            config.text_config._attn_implementation = PACKED
        self.vision_tower = vision_tower or build_tower(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        if instruction_tower is None and config.instruction_config is not None:
            instruction_tower = InstructionTower(config.instruction_config)
        self.instruction_tower = instruction_tower
        self.projector = build_projector(
            config.projector["type"],
            self.set_compressor(compressor_section(config.compressor)),
            config.text_config.hidden_size,
            input_norm=config.projector["input_norm"],
        )
        self.set_audio(audio_tower)
        self.question_encoder: Callable[[Sequence[str]], Encoded] | None = None
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
        video_grids: Sequence[Grid] | Tensor | None = None,
        audio_values: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        audio_grids: Sequence[Grid] | Tensor | None = None,
        image_features: Tensor | None = None,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        instructions: Sequence[str] | None = None,
        instruction_ids: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        step: int | None = None,
        cu_seq_lens: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_chunk: int = LOSS_CHUNK,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LlavaScaleOutput:
        """Loss, logits, or both, of text with pictures, videos and sounds in it.

        Args:
            input_ids: ``(B, S)``; each medium's placeholder repeated to its number of tokens.
            attention_mask: ``(B, S)``, 0 on padding; never with ``cu_seq_lens``.
            position_ids: ``(B, S)``; restarting at 0 with each sample of a packed row.
            past_key_values: Cache of earlier tokens.
            inputs_embeds: ``(B, S, D)`` instead of ``input_ids``, for text alone.
            labels: ``(B, S)``, not shifted, -100 where unsupervised. They may stay on the CPU, which saves a wait
                for the accelerator.
            pixel_values: ``(I, 3, H, W)`` all pictures in order of appearance; uint8, or float if normalised.
            pixel_values_videos: ``(F, 3, H, W)`` frames of all videos in order of appearance.
            video_grids: Grid of each video; None for one video of all frames.
            audio_values: ``(W, T, ...)`` windows of all sounds in order of appearance, made by the processor.
            audio_lengths: ``(W,)`` samples in each.
            audio_grids: Grid of each sound; None for one sound of all windows.
            image_features: ``(I, N, D)`` of the frozen tower, computed ahead, instead of ``pixel_values``.
            video_features: ``(F, N, D)``, the same instead of ``pixel_values_videos``.
            audio_features: ``(sum of features, D)``, the same instead of ``audio_values``.
            instructions: Question that goes with each picture, then with each video; for models that read them.
            instruction_ids: ``(I + videos, L)`` token ids of the same, made by the processor.
            instruction_mask: ``(I + videos, L)`` bool, false on padding.
            step: Optimizer step of schedules; None at evaluation, which has the final ratio.
            cu_seq_lens: ``(K + 1,)`` offsets of the samples in a packed row; B is then 1. May stay on the CPU.
            num_items_in_batch: Divides the summed loss; the mean over the supervised tokens here if None.
            loss_chunk: Supervised positions whose logits are held at once.
            use_cache: Whether keys and values are kept; never with ``cu_seq_lens``.
            logits_to_keep: Last positions, or chosen ones, whose logits are returned; 0 for all.
            **kwargs: For the language model.

        Raises:
            ShapeError: placeholders and media do not match, or the packed row is not laid out as promised.
        """
        media = MediaInputs(
            pictures=pixel_values if image_features is None else image_features,
            frames=pixel_values_videos if video_features is None else video_features,
            video_grids=_as_grids(video_grids),
            sounds=_as_sounds(audio_values, audio_lengths) if audio_features is None else audio_features,
            audio_grids=_as_grids(audio_grids),
            step=step,
            questions=self._questions(instructions, instruction_ids, instruction_mask),
        )
        embeds, images = self.embed(input_ids, inputs_embeds, media, past_key_values)
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
            loss = self.loss(hidden, *targets, num_items_in_batch, loss_chunk) + self._touch(media)
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
        inputs_embeds: Tensor | None,
        media: MediaInputs,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Text embeddings with the media in their places, ``(B, S, D)``, and the pictures' tokens ``(I, N, D)``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("give exactly one of input_ids and inputs_embeds")
        if input_ids is None:
            if media.pictures is not None or media.frames is not None or media.sounds is not None:
                raise ShapeError("pictures, videos and sounds need input_ids, whose placeholders say where they go")
            assert inputs_embeds is not None
            return inputs_embeds, None
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        images, videos = self.visual_embeddings(media)
        sounds = self._audio_embeddings(media)
        prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        for kind, tokens in (("image", images), ("video", videos), ("audio", sounds)):
            placeholder_id = getattr(self.config, f"{kind}_token_id")
            if tokens is not None:
                embeds = splice(embeds, input_ids, placeholder_id, tokens.view(-1, tokens.shape[-1]), kind=kind)
            elif prefill and input_ids.device.type == "cpu":
                check_count((input_ids == placeholder_id).sum(), 0, kind=kind)
        return embeds, images

    def _audio_embeddings(self, media: MediaInputs) -> Tensor | None:
        """Tokens of all sounds ``(sum of M, D)``; None where there are none."""
        if media.sounds is None:
            return None
        found, grids, step = media.sounds, media.audio_grids, media.step
        if isinstance(found, Tensor):
            return torch.cat(self.sound_tokens(found, grids, step=step))
        return torch.cat(self.get_audio_features(found.values, found.lengths, grids, step=step))

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

    def _questions(self, texts: Sequence[str] | None, ids: Tensor | None, mask: Tensor | None) -> Encoded | None:
        """Questions as token ids, if there are any and the model reads them."""
        if self.instruction_tower is None:
            return None
        if ids is not None:
            return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if not texts:
            return None
        if self.question_encoder is None:
            raise ConfigError(
                "this model reads questions, but was not given their tokenizer: load it with "
                "llava_scale.model.load_model, or give instruction_ids as the processor makes them"
            )
        return self.question_encoder(texts)

    def _touch(self, media: MediaInputs) -> Tensor | float:
        """Zero that depends on every trainable modality parameter that this pass has not used.

        Ranks whose rows hold text only then still take part in every gradient exchange, at no cost.
        """
        unused = self.unused_parameters(media) if torch.is_grad_enabled() else []
        if media.sounds is None and torch.is_grad_enabled():
            unused += self.audio_parameters()
        return sum((0.0 * parameter.flatten()[:1].sum() for parameter in unused if parameter.requires_grad), 0.0)

    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights of our own parts; each transformers model inside draws its own."""
        if isinstance(module, Projector | QueryCompressor | STC):
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


def _as_grids(grids: Sequence[Grid] | Tensor | None) -> Sequence[Grid] | None:
    """Grids as plain numbers; the processor gives them as a tensor ``(media, 3)``, which ``generate`` can carry."""
    if isinstance(grids, Tensor):
        return [(frames, rows, cols) for frames, rows, cols in grids.tolist()]
    return grids


def _as_sounds(values: Tensor | None, lengths: Tensor | None) -> AudioFeatures | None:
    if values is None:
        return None
    if lengths is None:
        raise ShapeError("audio_values need audio_lengths, the samples in each window")
    return AudioFeatures(values, lengths)


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
