"""What every compressor promises: its token count ahead of time, and tokens in the order of their anchors.

Legend: ``B`` pictures, clips or sounds, ``N`` tokens in, ``M`` tokens out, ``L`` tokens of a question, ``D`` width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from llava_scale.types import Grid


class CompressedTokens(NamedTuple):
    """Tokens that a compressor kept.

    Attributes:
        tokens: ``(B, M, D)``, in raster and time order of their anchors.
        positions: ``(B, M)`` int64, position of each token's anchor in the grid it came from.
        sizes: ``(B, M)``, float32 or that of float64 tokens: how many tokens of the grid each one stands for.
        group: ``(B, N)`` int64, which output each token of the grid went into, -1 where it went into none; None for
            compressors whose outputs have no such members.
    """

    tokens: Tensor
    positions: Tensor
    sizes: Tensor
    group: Tensor | None = None


class Instruction(NamedTuple):
    """Embedded questions, one for each medium.

    Attributes:
        features: ``(B, L, E)``.
        mask: ``(B, L)`` bool, false on padding.
    """

    features: Tensor
    mask: Tensor


class TowerSignals(NamedTuple):
    """What the last block of a vision tower tells of its patches, beside their features.

    Attributes:
        keys: ``(B, N, K)`` keys of its attention, averaged over the heads.
        saliency: ``(B, N)`` attention that each patch receives from the class token, or on average from all patches
            where there is no class token, averaged over the heads.
    """

    keys: Tensor
    saliency: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Everything that a compressor may look at beside the tokens.

    Attributes:
        step: Optimizer step; None at evaluation, where results are deterministic. Schedules and random choices are
            functions of it.
        instruction: Embedded questions, for compressors that read them (``needs_instruction``).
        signals: Of the vision tower, for compressors that look at them (``needs_signals``).
    """

    step: int | None = None
    instruction: Instruction | None = None
    signals: TowerSignals | None = None


EVALUATION = Context()
"""No step, no question, no signals."""


class TokenCount(Protocol):
    """The promise alone, without weights, as loader workers need it."""

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Tokens of one compressed medium of ``grid`` at optimizer step ``step`` (None: evaluation)."""
        ...


class Compressor(Protocol):
    """Fewer tokens from one medium; the count is known without running anything.

    For each ``(grid, step)`` the count is the same for every medium, so that batches stay dense and the loader can
    plan rows before anything is decoded.
    """

    @property
    def needs_instruction(self) -> bool:
        """Whether ``context.instruction`` is read."""
        ...

    @property
    def needs_signals(self) -> bool:
        """Whether ``context.signals`` are read."""
        ...

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Tokens that ``__call__`` returns for one medium of ``grid`` at optimizer step ``step``."""
        ...

    def out_width(self, in_width: int) -> int:
        """Width of the tokens that ``__call__`` returns for features of ``in_width``."""
        ...

    def __call__(self, x_BND: Tensor, grid: Grid, context: Context = EVALUATION) -> CompressedTokens:
        """Compress ``x_BND``, ``(B, N, D)`` with ``N`` the product of ``grid``, in raster and time order.

        Args:
            x_BND: Features of media that all have the same grid.
            grid: Frames, rows and columns of one medium.
            context: Step, question and signals.

        Raises:
            ShapeError: ``x_BND`` does not lie on ``grid``.
        """
        ...
