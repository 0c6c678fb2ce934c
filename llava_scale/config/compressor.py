"""Settings of what makes fewer visual tokens, one section for each kind, chosen by its ``type``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llava_scale.config.base import section
from llava_scale.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]

CLIP_TEXT = "openai/clip-vit-large-patch14"
"""Text tower that reads questions unless another is named."""


@section
class RatioConfig:
    """What all compressors that remove a share of the tokens have in common."""

    ratio: Ratio = 0.5
    """Share of the tokens that is removed once the ramp is over, and at evaluation."""
    ramp: Literal["cosine", "linear", "constant"] = "cosine"
    """How the share rises from 0; ``constant`` removes all of it from the first step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 4_000
    """Optimizer steps of the ramp."""
    after_projector: bool = False
    """Compress projected tokens, as the original did; before the projector is cheaper and the default."""


@section
class TokenMergingConfig(RatioConfig):
    """Average tokens into a neighbour that looks alike (ToMe for Stable Diffusion, in raster order)."""

    type: Literal["token_merging"]
    """Chooses this compressor."""
    mode: Literal["merge", "prune"] = "merge"
    """``prune`` drops the tokens instead of averaging them."""
    window: tuple[Count, Count, Count] = (1, 2, 2)
    """Frames, rows and columns that share a destination."""
    scope: Literal["frame", "clip", "window"] = "frame"
    """Where a token looks for its destination."""
    destination: Literal["random", "first"] = "random"
    """Place of the destination in its window while training; at evaluation it is the first."""
    metric: Literal["features", "keys"] = "features"
    """What is compared: the tokens, or the keys of the tower's last attention."""
    legacy: bool = False
    """The original's exact behaviour, to compare with: it drops tokens by a wrong index and stops the gradient of
    everything before it. Needs ``after_projector: true``; besides that only ratio, ramp, warm-up and window can be
    set."""

    def __post_init__(self) -> None:
        if not self.legacy:
            return
        if not self.after_projector:
            raise ConfigError("model.compressor.legacy drops projected tokens: set after_projector=true")
        plain = TokenMergingConfig(type="token_merging")
        for name in ("mode", "scope", "destination", "metric"):
            if getattr(self, name) != getattr(plain, name):
                raise ConfigError(f"model.compressor.{name} has no effect under legacy; leave it out")
        if self.window[0] != 1:
            raise ConfigError("model.compressor.window must hold one frame under legacy")


@section
class RandomPruneConfig(RatioConfig):
    """Keep places drawn at random: the baseline that every other method has to beat."""

    type: Literal["random_prune"]
    """Chooses this compressor."""


@section
class UniformPruneConfig(RatioConfig):
    """Keep places at equal distances."""

    type: Literal["uniform_prune"]
    """Chooses this compressor."""


@section
class DivPruneConfig(RatioConfig):
    """Keep the tokens that are most unlike each other."""

    type: Literal["divprune"]
    """Chooses this compressor."""


@section
class TemporalPruneConfig(RatioConfig):
    """Drop the video tokens that change least from frame to frame (EVS)."""

    type: Literal["temporal_prune"]
    """Chooses this compressor."""
    measure: Literal["cosine", "l1"] = "cosine"
    """How change is measured."""


@section
class VisionZipConfig(RatioConfig):
    """Keep the patches that the class token attends to; merge the others into a few."""

    type: Literal["visionzip"]
    """Chooses this compressor."""
    contextual_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15625
    """Share of the kept tokens that are merged ones (10 of 64 in the paper)."""


@section
class TomeConfig(RatioConfig):
    """Merge inside the blocks of the vision tower, with proportional attention (ToMe)."""

    type: Literal["tome"]
    """Chooses this compressor."""
    inflect: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.0
    """Spread over the blocks: 0 the same in each, -1 falling to none, 1 rising from none."""
    after_projector: Literal[False] = False
    """Merging inside the tower comes before the projector."""


@section
class PoolConfig:
    """One token for each window, by a fixed rule."""

    type: Literal["pool"]
    """Chooses this compressor."""
    mode: Literal["average", "max", "bilinear"] = "average"
    """How a window becomes a token; ``bilinear`` as LLaVA-OneVision."""
    window: tuple[Count, Count, Count] = (1, 2, 2)
    """Frames, rows and columns."""
    after_projector: bool = False
    """Pool projected tokens."""


@section
class PixelShuffleConfig:
    """Squares of tokens laid behind each other as one wide token (InternVL, SmolVLM, VILA)."""

    type: Literal["pixel_shuffle"]
    """Chooses this compressor."""
    factor: Annotated[int, Field(ge=2)] = 2
    """Side of the square."""


@section
class QFormerConfig:
    """Learned queries that read the question and look at windows of the tokens (SwinQFormer)."""

    type: Literal["qformer"]
    """Chooses this compressor."""
    num_queries: Count = 64
    """Tokens that are left of each frame or clip."""
    window: Count = 512
    """Tokens that each query sees; as many as there are tokens makes it a Perceiver resampler."""
    scope: Literal["frame", "clip"] = "frame"
    """One set of queries for each frame, or one for the whole clip."""
    instruction_tower: str = CLIP_TEXT
    """Text encoder that reads the question: hub name or folder; empty for queries that read none. The ``tiny`` preset
    has one of its own."""
    width: Annotated[int, Field(ge=0)] = 0
    """Width of the queries; 0 takes the vision tower's (the language model's under ``legacy``)."""
    num_layers: Count = 2
    """Layers."""
    num_heads: Count = 8
    """Attention heads; must divide the width."""
    pooled_queries: bool = True
    """Start each query from the mean of its share of the tokens."""
    position: Literal["sincos", "none"] = "sincos"
    """Whether frame, row and column are added to what queries look at."""
    legacy: bool = False
    """The original's exact form, one layer, one head, of which only queries, window, tower and width can be set; use
    it with ``model.projector.type=identity``."""

    def __post_init__(self) -> None:
        if self.legacy and (self.num_queries < 2 or not self.instruction_tower):
            raise ConfigError("model.compressor.legacy needs an instruction_tower and two queries or more")
        plain = QFormerConfig(type="qformer") if self.legacy else self
        for name in ("num_layers", "num_heads", "pooled_queries", "position", "scope"):
            if getattr(self, name) != getattr(plain, name):
                raise ConfigError(f"model.compressor.{name} has no effect under legacy; leave it out")


@section
class StcConfig:
    """Convolutions over space and time that make one token of each window (VideoLLaMA 2's STC connector)."""

    type: Literal["stc"]
    """Chooses this compressor."""
    width: Annotated[int, Field(ge=0)] = 0
    """Width inside; 0 takes the language model's, as in the paper."""
    depth: Count = 4
    """Blocks before the 3-D convolution, and as many behind it."""
    window: tuple[Count, Count, Count] = (2, 2, 2)
    """Frames, rows and columns that become one token."""


@section
class CustomConfig:
    """A compressor of your own, by import path."""

    type: Literal["custom"]
    """Chooses this compressor."""
    import_path: str
    """``package.module:Class``; the module must be importable wherever the checkpoint is loaded."""
    arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Arguments of its constructor."""
    after_projector: bool = False
    """Compress projected tokens."""
    instruction_tower: str = ""
    """Text encoder for a compressor that reads the question: hub name or folder."""

    def __post_init__(self) -> None:
        if not all(self.import_path.partition(":")):
            raise ConfigError(f"model.compressor.import_path must be package.module:Class, got {self.import_path!r}")


CompressorConfig = Annotated[
    TokenMergingConfig
    | RandomPruneConfig
    | UniformPruneConfig
    | DivPruneConfig
    | TemporalPruneConfig
    | VisionZipConfig
    | TomeConfig
    | PoolConfig
    | PixelShuffleConfig
    | QFormerConfig
    | StcConfig
    | CustomConfig,
    Field(discriminator="type"),
]
"""Any of them."""
