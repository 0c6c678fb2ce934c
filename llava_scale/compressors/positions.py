"""Where tokens lie in a grid of frames, rows and columns, as sines and cosines.

Legend: ``N`` tokens, ``P`` frames, rows and columns that they lie in, ``D`` width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_scale.types import Grid


def sincos_position(grid: Grid, width: int, *, like: Tensor) -> Tensor:
    """Sines and cosines of frame, row and column, ``(N, width)`` in the type and on the device of ``like``.

    A sixth of the width for each of the six; what is left over is zero.
    """
    sides = [torch.arange(side, device=like.device) for side in grid]
    places = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).view(-1, 3, 1)
    angles = (places * _waves(width, like.device)).flatten(1)
    return _with_rest(angles.sin(), angles.cos(), width).to(like.dtype)


def position_parts(grid: Grid, tokens: range, width: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of ``sincos_position``: which frame, row and column each of ``tokens`` has, and what these add.

    There are far fewer frames, rows and columns than tokens: products with the factors are small where those with
    their product are large.

    Returns:
        ``(N, P)`` of zeros and ones, three in each row, and ``(P, width)``; their product is the position of each
        token.
    """
    per_frame, cols = grid[1] * grid[2], grid[2]
    frames = range(tokens.start // per_frame, (tokens.stop - 1) // per_frame + 1)
    all_rows = range(tokens.start // cols, (tokens.stop - 1) // cols + 1)
    rows = (
        range(grid[1]) if len(frames) > 1 else range(all_rows.start % grid[1], all_rows.start % grid[1] + len(all_rows))
    )
    columns = range(cols) if len(all_rows) > 1 else range(tokens.start % cols, tokens.start % cols + len(tokens))
    number = torch.arange(tokens.start, tokens.stop, device=like.device)
    of_tokens = (number // per_frame, number // cols % grid[1], number % cols)
    sides = (frames, rows, columns)
    has = [F.one_hot(of - side.start, len(side)) for of, side in zip(of_tokens, sides, strict=True)]
    waves = _waves(width, like.device)
    angles = [torch.arange(side.start, side.stop, device=like.device).unsqueeze(1) * waves for side in sides]
    blocks = [F.pad(angle.sin(), (axis * len(waves), (2 - axis) * len(waves))) for axis, angle in enumerate(angles)]
    others = [F.pad(angle.cos(), (axis * len(waves), (2 - axis) * len(waves))) for axis, angle in enumerate(angles)]
    adds = _with_rest(torch.cat(blocks), torch.cat(others), width)
    return torch.cat(has, dim=1).to(like.dtype), adds.to(like.dtype)


def _waves(width: int, device: torch.device) -> Tensor:
    num_waves = width // 6
    return torch.exp(torch.arange(num_waves, device=device) * (-math.log(10_000.0) / max(num_waves, 1)))


def _with_rest(sines: Tensor, cosines: Tensor, width: int) -> Tensor:
    return F.pad(torch.cat([sines, cosines], dim=1), (0, width - 2 * sines.shape[1]))
