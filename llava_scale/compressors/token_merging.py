"""Local token merging: neighbours that look alike become one token, in the order of the picture.

In each window of the grid one token is a destination, the others are sources. The sources that resemble a
destination most are averaged into it (or dropped); all others stay. Destinations as in ToMe for Stable Diffusion
(arXiv:2303.17604 §4), merging as in ToMe (arXiv:2210.09461 §3). Ours: tokens keep raster order, since the language
model reads position from it; windows reach over frames; the number of tokens depends on grid and step alone.

Legend: ``B`` media, or parts of them that are searched on their own, ``N`` tokens, ``M`` destinations, ``D`` width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llava_scale.compressors.base import EVALUATION, CompressedTokens, Context
from llava_scale.compressors.merging import apply_drop, apply_merge, check_grid, drop_others, keep_all, plan_merge
from llava_scale.compressors.schedule import RatioSchedule, random_integers
from llava_scale.errors import ShapeError
from llava_scale.types import Grid

_PIECES = 8
"""Parts of a batch that are copied to a wider type one after the other."""

_HAS_MATRIX_UNITS = bool(dict(getattr(torch.cpu, "get_capabilities", dict)()).get("amx_bf16"))

Scope = Literal["frame", "clip", "window"]
Window = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTokenMerging:
    """Removes a share of the tokens of each medium; has no weights.

    Attributes:
        schedule: Share that is removed at each step.
        mode: ``merge`` averages a removed token into its destination, ``prune`` drops it.
        window: Frames, rows and columns that share a destination; made smaller where the grid is, and in time to the
            largest divisor of the number of frames, so that all parts of a clip are alike. Rows and columns beyond
            the last whole window hold sources only.
        scope: Where a source looks for its destination: in its ``frame`` (its window's frames, if these are
            several), in the whole ``clip``, or in its own ``window``.
        destination: ``random`` place in each window, another at each training step, or always its ``first`` token.
            At evaluation it is the first.
        metric: What is compared: the ``features`` themselves, or the ``keys`` of the tower's last attention.
    """

    schedule: RatioSchedule
    mode: Literal["merge", "prune"] = "merge"
    window: Window = (1, 2, 2)
    scope: Scope = "frame"
    destination: Literal["random", "first"] = "random"
    metric: Literal["features", "keys"] = "features"

    @property
    def needs_instruction(self) -> bool:
        """Never."""
        return False

    @property
    def needs_signals(self) -> bool:
        """Where keys are compared."""
        return self.metric == "keys"

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Tokens of one medium at ``step``."""
        frames, rows, cols = grid
        _, high, wide = window = fit_window(self.window, grid)
        stay = num_windows(window, grid)
        if self.scope == "window":
            stay += frames * (rows * cols - rows // high * high * (cols // wide) * wide)
        return self.schedule.num_kept(frames * rows * cols, step, least=stay)

    def out_width(self, in_width: int) -> int:
        """As it comes in."""
        return in_width

    def __call__(
        self,
        x_BND: Tensor,
        grid: Grid,
        context: Context = EVALUATION,
        *,
        offsets: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> CompressedTokens:
        """Merge or drop tokens of ``x_BND``, ``(B, N, D)``, N the product of ``grid``.

        Args:
            x_BND: Tokens in raster and time order; media never mix.
            grid: Frames, rows and columns.
            context: Step of ratio and destinations; signals for ``metric="keys"``.
            offsets: Destinations instead of the drawn ones: place in its window of each, int64, in raster order of
                the windows (any shape).
            sizes: ``(B, N)`` tokens that each one stands for already; all 1 if None.

        Raises:
            ShapeError: tokens or offsets do not fit the grid.
        """
        check_grid(x_BND, grid)
        num_kept = self.num_tokens(grid, context.step)
        if num_kept == x_BND.shape[1]:
            return keep_all(x_BND, sizes)
        metric = x_BND
        if self.metric == "keys":
            assert context.signals is not None, "metric='keys' needs the tower's signals"
            metric = context.signals.keys
        window = fit_window(self.window, grid)
        if offsets is None:
            offsets = self._draw_offsets(window, grid, context.step, x_BND.device)
        similarity, target = match(metric, grid, window, self.scope, destinations(grid, window, offsets))
        plan = plan_merge(similarity, target, num_kept)
        if self.mode == "prune":
            return apply_drop(x_BND, drop_others(plan.kept, x_BND.shape[1]))
        return apply_merge(x_BND, plan, sizes)

    def _draw_offsets(self, window: Window, grid: Grid, step: int | None, device: torch.device) -> Tensor:
        count = num_windows(window, grid)
        if self.destination == "first" or step is None:
            return torch.zeros(count, dtype=torch.int64, device=device)
        return random_integers(step, count, device=device) % (window[0] * window[1] * window[2])


def fit_window(window: Window, grid: Grid) -> Window:
    """``window`` made to fit into ``grid``; in time it becomes a divisor of the number of frames."""
    frames, rows, cols = grid
    deep = max(depth for depth in range(1, min(window[0], frames) + 1) if frames % depth == 0)
    return deep, min(window[1], rows), min(window[2], cols)


def num_windows(window: Window, grid: Grid) -> int:
    """Whole windows of a fitted ``window`` in ``grid``."""
    return (grid[0] // window[0]) * (grid[1] // window[1]) * (grid[2] // window[2])


def destinations(grid: Grid, window: Window, offsets: Tensor) -> Tensor:
    """Positions ``(M,)`` in the grid of the places ``offsets`` in each window, in raster order of the windows.

    Raises:
        ShapeError: another number of offsets than of windows.
    """
    _, rows, cols = grid
    deep, high, wide = window
    counts = (grid[0] // deep, rows // high, cols // wide)
    if offsets.numel() != counts[0] * counts[1] * counts[2]:
        raise ShapeError(f"{counts[0]} x {counts[1]} x {counts[2]} windows need as many offsets, got {offsets.numel()}")
    offsets = offsets.reshape(counts)
    frame, row, col = (torch.arange(count, device=offsets.device) for count in counts)
    at_frame = frame[:, None, None] * deep + offsets // (high * wide)
    at_row = row[:, None] * high + offsets // wide % high
    return ((at_frame * rows + at_row) * cols + col * wide + offsets % wide).flatten()


@torch.no_grad()
def match(metric_BND: Tensor, grid: Grid, window: Window, scope: Scope, dst_positions: Tensor) -> tuple[Tensor, Tensor]:
    """Most similar destination of each token.

    One matrix product gives all scores: only the destinations (a quarter of the tokens in 2 x 2 windows) are copied
    and normalised; the length of a source does not change which destination it likes best and is divided out of the
    best score alone. Products are at most as long as the tokens, so sixteen bits do not overflow.

    Args:
        metric_BND: What is compared, by the cosine of the angle.
        grid: Frames, rows, columns.
        window: Fitted window.
        scope: Where destinations are looked for.
        dst_positions: Positions of the destinations, in raster order of their windows.

    Returns:
        Cosine similarity ``(B, N)``, at least float32, ``-inf`` for the destinations themselves and for tokens that
        have none; position of the destination ``(B, N)`` int64.
    """
    num_batch, num_tokens, width = metric_BND.shape
    parts = 1 if scope == "clip" else grid[0] // window[0]
    x = metric_BND.reshape(num_batch * parts, -1, width)
    dst = metric_BND.index_select(1, dst_positions).view(num_batch * parts, -1, width)
    stays = torch.zeros(num_tokens, dtype=torch.bool, device=x.device).scatter(0, dst_positions, True)
    if scope != "window" and _multiplies_faster_in_float32(x):
        similarity, slot = _sources_in_pieces(x, dst, stays.view(parts, -1))
    else:
        own = None
        if scope == "window":
            own, outside = _own_window(grid, window, x.device)
            own, stays = own.view(parts, -1).repeat(num_batch, 1), stays | outside
        similarity, slot = _most_similar(x, dst, own)
    first_slot = torch.arange(parts, device=x.device).unsqueeze(1) * dst.shape[1]
    target = dst_positions[(slot.view(num_batch, parts, -1) + first_slot).view(num_batch, num_tokens)]
    return similarity.view(num_batch, num_tokens).masked_fill(stays, -torch.inf), target


def _multiplies_faster_in_float32(x: Tensor) -> bool:
    """Sixteen bits on a CPU, unless it has matrix units for them; AVX-512's own instructions are slower."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return x.dtype == torch.float16 or not _HAS_MATRIX_UNITS


def _sources_in_pieces(x_BND: Tensor, dst_BMD: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """As ``_most_similar``, in float32: sources, and only these, are copied, a piece at a time to stay in the cache.

    Args:
        x_BND: What is compared; B parts that are searched on their own.
        dst_BMD: Copies of the destinations.
        stays: ``(P, N)``, true for the destinations of each part of a medium; equally many in all.
    """
    num_parts, num_tokens = x_BND.shape[:2]
    num_sources = num_tokens - dst_BMD.shape[1]
    sources = stays.byte().argsort(dim=1, stable=True)[:, :num_sources].repeat(num_parts // stays.shape[0], 1)
    rows = sources + torch.arange(num_parts, device=x_BND.device).unsqueeze(1) * num_tokens
    flat, size = x_BND.reshape(-1, x_BND.shape[2]), -(-num_parts // _PIECES)
    found = [
        _most_similar(flat.index_select(0, row.flatten()).view(*row.shape, -1).float(), dst.float(), None)
        for row, dst in zip(torch.split(rows, size), torch.split(dst_BMD, size), strict=True)
    ]
    best, slot = (torch.cat(values) for values in zip(*found, strict=True))
    similarity = best.new_zeros(num_parts, num_tokens).scatter(1, sources, best)
    return similarity, slot.new_zeros(num_parts, num_tokens).scatter(1, sources, slot)


def _most_similar(x_BND: Tensor, dst_BMD: Tensor, own_BN: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine similarity of each token to its most similar destination, or to its ``own``, and that one's number.

    Args:
        x_BND: What is compared; B parts that are searched on their own.
        dst_BMD: Copies of the destinations, which are normalised in place.
        own_BN: Number of the only destination that each token may have; None for any.
    """
    unit = dst_BMD.mul_(_lengths(dst_BMD).reciprocal().to(dst_BMD.dtype).unsqueeze(-1))
    scores = torch.bmm(x_BND, unit.transpose(1, 2))
    if own_BN is None:
        best, slot = scores.max(dim=-1)
    else:
        best, slot = scores.gather(2, own_BN.unsqueeze(-1)).squeeze(-1), own_BN
    lengths = _lengths(x_BND)
    return best.to(lengths.dtype) / lengths, slot


def _lengths(x_BND: Tensor) -> Tensor:
    """Length of each token, ``(B, N)`` at least float32; a token of zeros has the smallest length above zero."""
    dtype = torch.float64 if x_BND.dtype == torch.float64 else torch.float32
    lengths: Tensor = torch.linalg.vector_norm(x_BND, dim=-1, dtype=dtype)
    return lengths.clamp_min(torch.finfo(torch.float16).tiny)


def _own_window(grid: Grid, window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of its window among those of its part, for each token; and which tokens lie in none."""
    frames, rows, cols = grid
    _, high, wide = window
    row, col = torch.arange(rows, device=device) // high, torch.arange(cols, device=device) // wide
    outside = (row >= rows // high)[:, None] | (col >= cols // wide)
    number = (row * (cols // wide))[:, None] + col
    number = number.masked_fill(outside, 0)
    return number.expand(frames, -1, -1).flatten(), outside.expand(frames, -1, -1).flatten()
