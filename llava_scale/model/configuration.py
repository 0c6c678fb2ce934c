"""What a checkpoint says of itself: sub-configs of the parts, and how they are put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import AutoConfig, CLIPTextConfig, CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from llava_scale.errors import ConfigError

IMAGE_ASPECT_RATIOS = ("pad", "resize")
FEATURE_SELECTS = ("patch", "full")
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class CustomVisionConfig(PreTrainedConfig):
    """A vision tower of the user's own, by import path.

    Args:
        import_path: ``package.module:Class``; the module must be importable where the checkpoint is loaded.
        arguments: Of its constructor, by name.
    """

    model_type = "llava_scale_custom_vision"
    base_config_key = "vision_config"

    def __init__(self, import_path: str = "", arguments: dict[str, Any] | None = None, **base: Any) -> None:
        self.import_path = import_path
        self.arguments = dict(arguments or {})
        super().__init__(**base)


class LlavaScaleConfig(PreTrainedConfig):
    """Vision tower, compressor, projector and language model of one checkpoint.

    Args:
        vision_config: Config of a transformers vision model, as it was before cutting, or a ``CustomVisionConfig``.
        text_config: Config of a causal language model of transformers.
        instruction_config: Config of the text encoder that reads questions; None where none are read.
        projector: ``type`` and ``input_norm`` of the projector.
        compressor: Fields of ``model.compressor``; None where all tokens stay.
        video: Fields of ``model.video``: how frames of videos are chosen.
        audio: ``tower`` (what ``describe_audio_tower`` tells), ``projector`` and ``compressor`` (as the two above) of a
            model that hears; None for one that does not.
        vision_feature_layer: Hidden state of the tower that is used; see ``towers.vision``.
        vision_feature_select: ``patch`` or ``full``.
        image_size: Side of the square picture in pixels.
        image_aspect_ratio: ``pad`` or ``resize``.
        image_mean: Per channel, of pixels in [0, 1].
        image_std: Per channel, of pixels in [0, 1].
        image_token_id: Token of ``<image>``.
        video_token_id: Token of ``<video>``.
        audio_token_id: Token of ``<audio>``.
        chat_template_name: Template that the model was trained with: ``plain``, ``vicuna_v1`` or ``native``.
        tie_word_embeddings: Taken from ``text_config`` where that ties them.
        **base: What every transformers config takes.

    Raises:
        ConfigError: a choice that does not exist.
    """

    model_type = "llava_scale"
    sub_configs = {  # noqa: RUF012
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
        "instruction_config": AutoConfig,
    }

    def __init__(
        self,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        instruction_config: dict[str, Any] | PreTrainedConfig | None = None,
        projector: dict[str, Any] | None = None,
        compressor: dict[str, Any] | None = None,
        video: dict[str, Any] | None = None,
        audio: dict[str, Any] | None = None,
        vision_feature_layer: int = -2,
        vision_feature_select: str = "patch",
        image_size: int = 0,
        image_aspect_ratio: Literal["pad", "resize"] = "pad",
        image_mean: Sequence[float] = OPENAI_MEAN,
        image_std: Sequence[float] = OPENAI_STD,
        image_token_id: int = 0,
        video_token_id: int = 0,
        audio_token_id: int = 0,
        chat_template_name: str = "native",
        tie_word_embeddings: bool = False,
        **base: Any,
    ) -> None:
        self.vision_config = _sub_config(vision_config, default=CLIPVisionConfig)
        self.text_config = _sub_config(text_config, default=LlamaConfig)
        self.instruction_config = instruction_config and _sub_config(instruction_config, default=CLIPTextConfig)
        self.compressor = compressor
        self.video = dict(video or {})
        self.audio = audio
        self.projector = {"type": "mlp2x_gelu", "input_norm": False, **(projector or {})}
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select = _one_of("vision_feature_select", vision_feature_select, FEATURE_SELECTS)
        self.image_size = image_size or getattr(self.vision_config, "image_size", 0)
        self.image_aspect_ratio: Any = _one_of("image_aspect_ratio", image_aspect_ratio, IMAGE_ASPECT_RATIOS)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.audio_token_id = audio_token_id
        self.chat_template_name = chat_template_name
        tied = tie_word_embeddings or bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(tie_word_embeddings=tied, **base)


def _sub_config(value: dict[str, Any] | PreTrainedConfig | None, *, default: type[PreTrainedConfig]) -> Any:
    if isinstance(value, PreTrainedConfig):
        return value
    fields = dict(value or {})
    model_type = fields.pop("model_type", "")
    return AutoConfig.for_model(model_type, **fields) if model_type else default(**fields)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value
