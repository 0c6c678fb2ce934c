"""Neighbouring tokens into one by fixed rules: average, maximum, bilinear, pixel shuffle.

Legend: ``B`` media, ``N`` tokens in, ``M`` tokens out, ``T`` frames, ``H``/``W`` rows and columns, ``D`` width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_scale.compressors.base import EVALUATION, CompressedTokens, Context
from llava_scale.compressors.merging import check_grid
from llava_scale.compressors.token_merging import Window
from llava_scale.types import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """One token for each window of the grid.

    In time a last, shorter window is pooled too (VILA's temporal pooling, arXiv:2412.04468, where frames divide); in
    rows and columns as in LLaVA-NeXT: ``average`` and ``max`` leave out what is beyond the last whole window,
    ``bilinear`` resizes to the next larger grid (LLaVA-OneVision, arXiv:2408.03326 §3.2).

    Attributes:
        mode: How a window becomes a token.
        window: Frames, rows and columns; made smaller where the grid is.
    """

    mode: Literal["average", "max", "bilinear"] = "average"
    window: Window = (1, 2, 2)

    @property
    def needs_instruction(self) -> bool:
        """Never."""
        return False

    @property
    def needs_signals(self) -> bool:
        """Never."""
        return False

    def out_grid(self, grid: Grid) -> Grid:
        """Frames, rows and columns that are left of ``grid``."""
        deep, high, wide = self._fitted(grid)
        ends = math.ceil if self.mode == "bilinear" else math.floor
        return math.ceil(grid[0] / deep), ends(grid[1] / high), ends(grid[2] / wide)

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Windows in ``grid``, whatever the step."""
        return math.prod(self.out_grid(grid))

    def out_width(self, in_width: int) -> int:
        """As it comes in."""
        return in_width

    def __call__(self, x_BND: Tensor, grid: Grid, context: Context = EVALUATION) -> CompressedTokens:
        """Pool ``(B, N, D)`` on ``grid`` to ``(B, M, D)``; a token's anchor is the first place of its window."""
        check_grid(x_BND, grid)
        deep, high, wide = window = self._fitted(grid)
        frames, rows, cols = self.out_grid(grid)
        x_BDTHW = x_BND.transpose(1, 2).reshape(x_BND.shape[0], -1, *grid)
        x_BDTHW = _pool_time(x_BDTHW, deep, maximum=self.mode == "max")
        maps = x_BDTHW.transpose(1, 2).flatten(0, 1)
        if self.mode == "bilinear":
            maps = F.interpolate(maps, size=(rows, cols), mode="bilinear")
        elif self.mode == "max":
            maps = F.max_pool2d(maps, (high, wide))
        else:
            maps = F.avg_pool2d(maps, (high, wide))
        tokens = maps.view(x_BND.shape[0], frames, -1, rows * cols).transpose(2, 3).flatten(1, 2)
        out = on_windows(tokens, grid, window, (frames, rows, cols))
        if self.mode == "bilinear":  # which blends neighbouring windows where sides do not divide
            return out
        return out._replace(group=_group_of(grid, window, (frames, rows, cols), out))

    def _fitted(self, grid: Grid) -> Window:
        deep, high, wide = (min(side, limit) for side, limit in zip(self.window, grid, strict=True))
        return deep, high, wide


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelShuffle:
    """Squares of ``factor`` x ``factor`` tokens laid behind each other as one wide token; nothing is lost.

    Channels run row, column, feature, as in InternVL, SmolVLM and VILA alike. Sides that ``factor`` does not divide
    are filled with zeros (VILA).

    Attributes:
        factor: Side of the square.
    """

    factor: int = 2

    @property
    def needs_instruction(self) -> bool:
        """Never."""
        return False

    @property
    def needs_signals(self) -> bool:
        """Never."""
        return False

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Squares in ``grid``, whatever the step."""
        return grid[0] * math.ceil(grid[1] / self.factor) * math.ceil(grid[2] / self.factor)

    def out_width(self, in_width: int) -> int:
        """Width of a whole square."""
        return in_width * self.factor**2

    def __call__(self, x_BND: Tensor, grid: Grid, context: Context = EVALUATION) -> CompressedTokens:
        """Shuffle ``(B, N, D)`` on ``grid`` to ``(B, M, factor * factor * D)``; anchors are the squares' corners."""
        check_grid(x_BND, grid)
        frames, rows, cols = grid
        side = self.factor
        x_BTHWD = F.pad(x_BND.reshape(x_BND.shape[0], *grid, -1), (0, 0, 0, -cols % side, 0, -rows % side))
        rows, cols = x_BTHWD.shape[2] // side, x_BTHWD.shape[3] // side
        squares = x_BTHWD.reshape(x_BND.shape[0], frames, rows, side, cols, side, -1).transpose(3, 4)
        tokens = squares.reshape(x_BND.shape[0], frames * rows * cols, -1)
        out = on_windows(tokens, grid, (1, side, side), (frames, rows, cols))
        return out._replace(group=_group_of(grid, (1, side, side), (frames, rows, cols), out))


def _pool_time(x_BDTHW: Tensor, deep: int, *, maximum: bool) -> Tensor:
    if deep == 1:
        return x_BDTHW
    if maximum:
        return F.max_pool3d(x_BDTHW, (deep, 1, 1), ceil_mode=True)
    return F.avg_pool3d(x_BDTHW, (deep, 1, 1), ceil_mode=True, count_include_pad=False)


def on_windows(tokens: Tensor, grid: Grid, window: Window, out_grid: Grid) -> CompressedTokens:
    """Tokens with the first places of their windows, and the number of places in each."""
    device = tokens.device
    starts = [torch.arange(count, device=device) * side for count, side in zip(out_grid, window, strict=True)]
    extents = [(limit - start).clamp(max=side) for start, side, limit in zip(starts, window, grid, strict=True)]
    frame, row, col = starts
    positions = ((frame[:, None, None] * grid[1] + row[:, None]) * grid[2] + col).flatten()
    sizes = (extents[0][:, None, None] * extents[1][:, None] * extents[2]).flatten().float()
    num_batch = tokens.shape[0]
    return CompressedTokens(tokens, positions.expand(num_batch, -1), sizes.expand(num_batch, -1))


def _group_of(grid: Grid, window: Window, out_grid: Grid, out: CompressedTokens) -> Tensor:
    """Window that each place lies in, -1 beyond the last one."""
    device = out.tokens.device
    numbers = [torch.arange(limit, device=device) // side for limit, side in zip(grid, window, strict=True)]
    inside = [number < count for number, count in zip(numbers, out_grid, strict=True)]
    frame, row, col = numbers
    group = (frame[:, None, None] * out_grid[1] + row[:, None]) * out_grid[2] + col
    group = group.where(inside[0][:, None, None] & inside[1][:, None] & inside[2], -1)
    return group.flatten().expand(out.tokens.shape[0], -1)
