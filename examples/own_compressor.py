"""Own compressors: one without weights, one with. Both say how many tokens they leave before anything is computed.

Copy what you need and name it in a recipe; the module must be on PYTHONPATH::

    PYTHONPATH=examples llava-scale train configs/quickstart.yaml \
        'model.compressor={type: custom, import_path: own_compressor:Fovea, arguments: {centre: 4}}' \
        'data.sources=[{path: data/train}]' train.steps=200 train.output_dir=runs/fovea

The count is a promise: rows are packed by it, and a compressor that returns another number is refused.

Legend: ``B`` media, ``N`` tokens in, ``M`` tokens out, ``T`` frames, ``H``/``W`` rows and columns, ``D`` width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from llava_scale.compressors import EVALUATION, CompressedTokens, Context

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, int, int]
"""Frames, rows and columns; a sound is ``(1, 1, n)``."""


@dataclass(frozen=True)
class Fovea:
    """Sharp in the middle, coarse at the rim: single tokens in the centre, windows of 2 x 2 averaged around it.

    Attributes:
        centre: Rows and columns of the part that stays as it is, from an even row and column on.
    """

    centre: int = 8

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Tokens of one medium on ``grid``, at any step."""
        return grid[0] * (max(_groups(grid[1], grid[2], self.centre)) + 1)

    def __call__(self, x_BND: Tensor, grid: Grid, context: Context = EVALUATION) -> CompressedTokens:
        """Average the groups of ``(B, N, D)``; a token's anchor is the first place of its group."""
        frames, rows, cols = grid
        one_frame = torch.tensor(_groups(rows, cols, self.centre), device=x_BND.device)
        per_frame = int(one_frame.max()) + 1
        first = torch.arange(frames, device=x_BND.device)[:, None] * per_frame
        group_N = (first + one_frame).flatten()
        num_out = frames * per_frame
        sizes = torch.bincount(group_N, minlength=num_out)
        sums = x_BND.new_zeros(x_BND.shape[0], num_out, x_BND.shape[2]).index_add(1, group_N, x_BND)
        places = torch.arange(len(group_N), device=x_BND.device)
        anchors = places.new_full((num_out,), len(places)).scatter_reduce(0, group_N, places, "amin")
        batch = x_BND.shape[0]
        return CompressedTokens(
            tokens=sums / sizes[:, None].to(sums.dtype),
            positions=anchors.expand(batch, -1),
            sizes=sizes.float().expand(batch, -1),
            group=group_N.expand(batch, -1),  # shown by `llava-scale show merges`
        )


@lru_cache
def _groups(rows: int, cols: int, centre: int) -> tuple[int, ...]:
    """Output of each place of a frame, in raster order of the outputs' first places."""
    top, left = (max((side - centre) // 2, 0) // 2 * 2 for side in (rows, cols))
    numbers: dict[tuple[int, int, bool], int] = {}
    groups = []
    for row in range(rows):
        for col in range(cols):
            inside = top <= row < top + centre and left <= col < left + centre
            corner = (row, col) if inside else (row // 2 * 2, col // 2 * 2)
            groups.append(numbers.setdefault((*corner, inside), len(numbers)))
    return tuple(groups)


class StridedConv(nn.Module):
    """One token for each ``stride`` x ``stride`` window of a frame, by a convolution that is trained.

    Args:
        in_width: D of the tokens that come in; given by the model.
        width: Of the tokens that go out; 0 keeps it.
        stride: Side of the window.
    """

    def __init__(self, in_width: int, *, width: int = 0, stride: int = 2) -> None:
        super().__init__()
        self.width, self.stride = width or in_width, stride
        self.conv = nn.Conv2d(in_width, self.width, stride, stride=stride)

    @classmethod
    def token_count(cls, *, width: int = 0, stride: int = 2) -> Windows:
        """What loader workers count with: no weights, the same arguments."""
        return Windows(stride)

    def out_width(self, in_width: int) -> int:
        """Width of the tokens that go out, which the projector gets."""
        return self.width

    def forward(self, x_BND: Tensor, grid: Grid, context: Context = EVALUATION) -> CompressedTokens:
        """Compress ``(B, N, D)`` on ``grid``; rows and columns are filled with zeros to whole windows."""
        (frames, rows, cols), side, batch = grid, self.stride, x_BND.shape[0]
        maps = x_BND.reshape(batch * frames, rows, cols, -1).permute(0, 3, 1, 2)
        maps = self.conv(nn.functional.pad(maps, (0, -cols % side, 0, -rows % side)))
        tokens = maps.flatten(2).transpose(1, 2).reshape(batch, -1, self.width)
        frame, row, col = (
            torch.arange(n, device=x_BND.device) * step
            for n, step in ((frames, 1), (maps.shape[2], side), (maps.shape[3], side))
        )
        positions = ((frame[:, None, None] * rows + row[:, None]) * cols + col).flatten()
        sizes = torch.full((batch, tokens.shape[1]), float(side * side), device=x_BND.device)
        return CompressedTokens(tokens, positions.expand(batch, -1), sizes)


@dataclass(frozen=True)
class Windows:
    """Tokens of a ``StridedConv``.

    Attributes:
        stride: Side of the window.
    """

    stride: int

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Windows of one medium on ``grid``, those cut by an edge too."""
        return grid[0] * math.ceil(grid[1] / self.stride) * math.ceil(grid[2] / self.stride)
