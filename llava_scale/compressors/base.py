"""What every compressor promises: its token count ahead of time, and tokens in the order of their anchors.

Legend: ``B`` pictures, clips or sounds, ``N`` tokens in, ``M`` tokens out, ``D`` width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llava_scale.types import Grid


class CompressedTokens(NamedTuple):
    """Tokens that a compressor kept.

    Attributes:
        tokens: ``(B, M, D)``, in raster and time order of their anchors.
        positions: ``(B, M)`` int64, position of each token's anchor in the grid it came from.
        sizes: ``(B, M)``, how many tokens of the grid each one stands for.
    """

    tokens: Tensor
    positions: Tensor
    sizes: Tensor


class Compressor(Protocol):
    """Fewer tokens from one medium; the count is known without running anything.

    For each ``(grid, step)`` the count is the same for every medium, so that batches stay dense and the loader can
    plan rows before anything is decoded. Schedules are functions of ``step``; ``None`` means evaluation, where the
    result is deterministic.
    """

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Tokens that ``__call__`` returns for one medium of ``grid`` at optimizer step ``step``."""
        ...

    def __call__(
        self,
        x_BND: Tensor,
        grid: Grid,
        *,
        instruction: Tensor | None = None,
        step: int | None = None,
        generator: torch.Generator | None = None,
    ) -> CompressedTokens:
        """Compress ``x_BND``, ``(B, N, D)`` with ``N`` the product of ``grid``.

        Args:
            x_BND: Tower features in raster and time order.
            grid: Frames, rows and columns of one medium.
            instruction: ``(B, L, E)`` embedded question, for compressors that read it.
            step: Optimizer step; ``None`` at evaluation.
            generator: Source of every random choice in training.
        """
        ...
