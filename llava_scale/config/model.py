"""Settings of the model: which towers, projector and language model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llava_scale.config.base import section
from llava_scale.config.compressor import CompressorConfig
from llava_scale.errors import ConfigError


@section
class ProjectorConfig:
    """Maps tower features into the language model's width."""

    type: str = "mlp2x_gelu"
    """``linear``, ``mlp2x_gelu`` (any depth as ``mlp<N>x_gelu``) or ``identity``."""
    input_norm: bool = False
    """LayerNorm before the first layer; helps towers whose features are not normalised."""
    match_embedding_scale: bool = False
    """Start with outputs at the root mean square of the language model's embeddings."""


@section
class VideoConfig:
    """How frames of videos are chosen; a checkpoint keeps it."""

    scheme: Literal[
        "time",
        "time_fps",
        "uniform",
        "fps",
        "videollama2",
        "videollama2_fps",
        "llava_next",
        "transformers",
        "transformers_fps",
    ] = "time"
    """``time``: the frames shown in the middles of equal spans of time; ``time_fps``: as many spans as ``fps`` asks
    for. The others take the indices that the official code of that name takes."""
    num_frames: Annotated[int, Field(ge=1)] = 8
    """Frames of a video; schemes that go by ``fps`` do not use it."""
    fps: Annotated[float, Field(gt=0.0)] = 1.0
    """Frames a second, for schemes that go by it."""
    max_frames: Annotated[int, Field(ge=1)] = 32
    """Most frames of a video; more are spaced anew over the whole video, never cut off."""
    timestamps: bool = False
    """Say before the tokens of each frame when it is shown, as text: ``<3.0 seconds>``, counted from the first frame.
    Needs a scheme that goes by time."""
    sound_order: Literal["concat", "interleave"] = "concat"
    """Tokens of a sound whose ``<audio>`` stands right behind a ``<video>``: all behind the video's (``concat``), or 2
    seconds of both in turn (``interleave``)."""
    frames_at_once: Annotated[int, Field(ge=0)] = 0
    """Most pictures or frames that the vision tower gets at once, so that long videos do not need more memory; 0 gives
    it all of them."""

    def __post_init__(self) -> None:
        if self.timestamps and self.scheme not in ("time", "time_fps"):
            raise ConfigError(
                f"model.video.timestamps needs times that are known before decoding, but scheme {self.scheme!r} goes "
                "by index: set model.video.scheme to time or time_fps"
            )


@section
class ModelConfig:
    """What the model is put together from.

    Either ``init_from`` (a checkpoint of ours), or ``preset``, or towers and language model by name.
    """

    init_from: str = ""
    """Checkpoint folder of an earlier stage; the other model fields must then be left alone."""
    preset: Literal["", "tiny"] = ""
    """``tiny``: a small random model with its own tokenizer, for tests and the quickstart."""
    language_model: str = ""
    """Hub name or folder of any causal language model of transformers."""
    vision_tower: str = ""
    """Hub name or folder of a vision model of transformers, or ``package.module:Class`` of your own, also under
    ``preset``."""
    vision_tower_kwargs: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Arguments for a tower given by import path."""
    vision_feature_layer: int = -2
    """Hidden state that is used, counted as in LLaVA; layers above it are cut away."""
    vision_feature_select: Literal["patch", "full"] = "patch"
    """``patch`` drops the class token."""
    image_size: Annotated[int, Field(ge=0)] = 0
    """Side of the square picture in pixels; 0 takes the tower's own."""
    image_aspect_ratio: Literal["pad", "resize"] = "pad"
    """``pad`` keeps the shape on a square of the mean colour; ``resize`` stretches."""
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)
    """Between vision tower and language model."""
    compressor: CompressorConfig | None = None
    """Fewer visual tokens: ``{type: token_merging, ratio: 0.5}`` or another ``type``; none leaves all of them."""
    video: VideoConfig = Field(default_factory=VideoConfig)
    """How frames of videos are chosen."""
    audio_tower: str = ""
    """For a model that hears: an official BEATs file (``.pt``), hub name or folder of an audio encoder of transformers,
    or ``tiny`` for a small random one (under ``preset: tiny``). Beside ``init_from`` it gives hearing to a checkpoint
    that has none."""
    audio_window_seconds: Annotated[float, Field(ge=0.0)] = 0.0
    """Longest window that the audio tower gets at once; 0 takes what it was trained on."""
    audio_projector: ProjectorConfig = Field(default_factory=ProjectorConfig)
    """Between audio tower and language model."""
    audio_compressor: CompressorConfig | None = None
    """Fewer audio tokens: ``{type: pool, window: [1, 1, 8]}`` makes one of eight; none leaves all of them."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which weights are held."""

    def __post_init__(self) -> None:
        if not self.audio_tower:
            for name in ("audio_window_seconds", "audio_projector", "audio_compressor"):
                if getattr(self, name) not in (0.0, None, ProjectorConfig()):
                    raise ConfigError(f"model.{name} needs model.audio_tower: set that, or leave it out")
        own_tower = ":" in self.vision_tower and bool(self.preset)
        named = bool(self.language_model or (self.vision_tower and not own_tower))
        if sum([bool(self.init_from), bool(self.preset), named]) > 1:
            raise ConfigError(
                "model.init_from, model.preset and model.language_model/vision_tower exclude each other: "
                "set one of them"
            )
