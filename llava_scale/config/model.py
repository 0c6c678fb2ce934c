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
    """Hub name or folder of a vision model of transformers, or ``package.module:Class`` of your own."""
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
    torch_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which weights are held."""

    def __post_init__(self) -> None:
        named = bool(self.language_model or self.vision_tower)
        if sum([bool(self.init_from), bool(self.preset), named]) > 1:
            raise ConfigError(
                "model.init_from, model.preset and model.language_model/vision_tower exclude each other: "
                "set one of them"
            )
