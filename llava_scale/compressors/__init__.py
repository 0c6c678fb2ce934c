"""From tower features to the tokens that the language model reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from llava_scale.compressors.base import (
    EVALUATION,
    CompressedTokens,
    Compressor,
    Context,
    Instruction,
    TokenCount,
    TowerSignals,
)
from llava_scale.compressors.blocks import SignalTap
from llava_scale.compressors.custom import CustomCompressor, count_of
from llava_scale.compressors.legacy_dropping import LegacyDropping
from llava_scale.compressors.pooling import PixelShuffle, Pooling
from llava_scale.compressors.projector import Projector, identity_layers, linear_layers, mlp_layers
from llava_scale.compressors.schedule import RatioSchedule
from llava_scale.compressors.selection import DivPrune, RandomPrune, TemporalPrune, UniformPrune, VisionZip
from llava_scale.compressors.stc import STC, STCCount
from llava_scale.compressors.swin_qformer import (
    LegacySwinQFormer,
    QueryCompressor,
    QueryCount,
    SwinQFormer,
    recorded_attention,
)
from llava_scale.compressors.token_merging import LocalTokenMerging
from llava_scale.compressors.tome import TomeCount, TomeInBlocks
from llava_scale.config.compressor import (
    CompressorConfig,
    CustomConfig,
    DivPruneConfig,
    PixelShuffleConfig,
    PoolConfig,
    QFormerConfig,
    RandomPruneConfig,
    RatioConfig,
    StcConfig,
    TemporalPruneConfig,
    TokenMergingConfig,
    TomeConfig,
    UniformPruneConfig,
    VisionZipConfig,
)
from llava_scale.errors import ConfigError, suggest

__all__ = [
    "EVALUATION",
    "PROJECTORS",
    "STC",
    "CompressedTokens",
    "Compressor",
    "Context",
    "CustomCompressor",
    "Instruction",
    "Projector",
    "QueryCompressor",
    "SignalTap",
    "TokenCount",
    "TomeCount",
    "TomeInBlocks",
    "TowerSignals",
    "build_projector",
    "build_qformer",
    "build_stc",
    "build_weightless",
    "parse_compressor",
    "recorded_attention",
    "token_count",
]

DEEPEST_MLP = 8

PROJECTORS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "linear": linear_layers,
    "identity": identity_layers,
    **{f"mlp{depth}x_gelu": partial(mlp_layers, depth=depth) for depth in range(1, DEEPEST_MLP + 1)},
}
"""Layers between two widths, by the name that ``model.projector.type`` takes."""


def build_projector(name: str, in_width: int, out_width: int, *, input_norm: bool) -> Projector:
    """Return the projector called ``name`` with fresh weights.

    Raises:
        ConfigError: unknown name, or ``identity`` between different widths.
    """
    if name not in PROJECTORS:
        raise ConfigError(f"model.projector.type: unknown projector {name!r}; {suggest(name, PROJECTORS)}")
    return Projector(PROJECTORS[name](in_width, out_width), input_norm=in_width if input_norm else 0)


def parse_compressor(fields: dict[str, Any]) -> CompressorConfig:
    """The section that ``fields``, as saved in a checkpoint, describe."""
    section: CompressorConfig = _sections().validate_python(fields)
    return section


@cache
def _sections() -> TypeAdapter[CompressorConfig]:
    return TypeAdapter(CompressorConfig)  # takes milliseconds to make, and sections are asked for with each medium


def _merging(config: TokenMergingConfig) -> Compressor:
    if config.legacy:
        return LegacyDropping(schedule=_schedule(config), window=config.window)
    return LocalTokenMerging(
        schedule=_schedule(config),
        mode=config.mode,
        window=config.window,
        scope=config.scope,
        destination=config.destination,
        metric=config.metric,
    )


def _visionzip(config: VisionZipConfig) -> Compressor:
    return VisionZip(schedule=_schedule(config), contextual_share=config.contextual_share)


def _temporal_prune(config: TemporalPruneConfig) -> Compressor:
    return TemporalPrune(schedule=_schedule(config), measure=config.measure)


def _pool(config: PoolConfig) -> Compressor:
    return Pooling(mode=config.mode, window=config.window)


def _pixel_shuffle(config: PixelShuffleConfig) -> Compressor:
    return PixelShuffle(factor=config.factor)


_WEIGHTLESS: dict[type, Callable[[Any], Compressor]] = {
    TokenMergingConfig: _merging,
    RandomPruneConfig: lambda config: RandomPrune(schedule=_schedule(config)),
    UniformPruneConfig: lambda config: UniformPrune(schedule=_schedule(config)),
    DivPruneConfig: lambda config: DivPrune(schedule=_schedule(config)),
    TemporalPruneConfig: _temporal_prune,
    VisionZipConfig: _visionzip,
    PoolConfig: _pool,
    PixelShuffleConfig: _pixel_shuffle,
}


def build_weightless(config: CompressorConfig) -> Compressor | None:
    """The compressor between tower and language model that ``config`` describes; None for those that are elsewhere
    (``tome``, inside the tower) or may have weights (``qformer``, ``stc``, ``custom``)."""
    build = _WEIGHTLESS.get(type(config))
    return build(config) if build else None


def build_qformer(config: QFormerConfig, *, in_width: int, text_width: int, instruction_width: int) -> QueryCompressor:
    """The query compressor that ``config`` describes, with fresh weights.

    Raises:
        ConfigError: the heads do not divide the width.
    """
    if config.legacy:
        return LegacySwinQFormer(
            in_width,
            instruction_width=instruction_width,
            width=config.width or text_width,
            num_queries=config.num_queries,
            window=config.window,
        )
    width = config.width or in_width
    if width % config.num_heads:
        raise ConfigError(
            f"model.compressor.num_heads is {config.num_heads}, which does not divide the width {width}; "
            "change it, or model.compressor.width"
        )
    return SwinQFormer(
        in_width,
        instruction_width=instruction_width,
        width=width,
        num_queries=config.num_queries,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        window=config.window,
        scope=config.scope,
        pooled_queries=config.pooled_queries,
        position=config.position,
    )


def build_stc(config: StcConfig, *, in_width: int, text_width: int) -> STC:
    """The connector that ``config`` describes, with fresh weights."""
    return STC(in_width, width=config.width or text_width, depth=config.depth, window=config.window)


def token_count(config: CompressorConfig, *, num_blocks: int) -> TokenCount:
    """The promise of the compressor that ``config`` describes, without weights.

    Args:
        config: Its settings.
        num_blocks: Blocks of the vision tower, among which ``tome`` spreads its work.
    """
    if isinstance(config, QFormerConfig):
        return QueryCount(num_queries=config.num_queries, scope=config.scope)
    if isinstance(config, TomeConfig):
        return TomeCount(schedule=_schedule(config), num_blocks=num_blocks, inflect=config.inflect)
    if isinstance(config, StcConfig):
        return STCCount(config.window)
    if isinstance(config, CustomConfig):
        return count_of(config)
    compressor = build_weightless(config)
    assert compressor is not None
    return compressor


def _schedule(config: RatioConfig) -> RatioSchedule:
    """``constant`` is a ramp of no steps, so that its counts are exact from the first."""
    steps = 0 if config.ramp == "constant" else config.warmup_steps
    return RatioSchedule(final=config.ratio, warmup_steps=steps, ramp=config.ramp)
