"""From tower features to the tokens that the language model reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from llava_scale.compressors.base import CompressedTokens, Compressor
from llava_scale.compressors.projector import Projector, identity_layers, linear_layers, mlp_layers
from llava_scale.errors import ConfigError, suggest

__all__ = ["PROJECTORS", "CompressedTokens", "Compressor", "Projector", "build_projector"]

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
