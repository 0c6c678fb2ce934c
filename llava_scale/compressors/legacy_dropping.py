"""The original's local token merging as it was: it drops tokens by a wrong index, and stops the gradient.

Kept to compare with. Legend: ``B`` pictures, ``N`` tokens of one, ``S`` sources, ``D`` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_scale.compressors.base import EVALUATION, CompressedTokens, Context
from llava_scale.compressors.merging import apply_drop, check_grid, drop_others, gather_tokens, keep_all
from llava_scale.compressors.schedule import random_integers
from llava_scale.compressors.selection import Selection
from llava_scale.compressors.token_merging import Window, destinations, fit_window, num_windows
from llava_scale.types import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyDropping(Selection):
    """What the original computed instead of merging.

    The places of the most similar sources in the list of sources are taken for places in the picture: so other tokens
    than the similar ones are dropped, destinations among them, and never any of the last quarter of the picture.
    Nothing before it learns once a token is dropped: gradients are zero (the original had none, which leaves weights
    without decay too). Frames of a clip are pictures of their own; the original could not take clips.

    Attributes:
        window: One frame, rows and columns that share a destination.
    """

    window: Window = (1, 2, 2)

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Tokens of one medium at ``step``; on a ramp not rounded."""
        per_frame = grid[1] * grid[2]
        return grid[0] * (per_frame - self._num_dropped(grid, step))

    def __call__(
        self, x_BND: Tensor, grid: Grid, context: Context = EVALUATION, *, offsets: Tensor | None = None
    ) -> CompressedTokens:
        """Drop tokens of ``x_BND``, ``(B, N, D)``, N the product of ``grid``.

        Args:
            x_BND: Tokens in raster and time order.
            grid: Frames, rows and columns.
            context: Step of ratio and destinations.
            offsets: Destinations instead of the drawn ones: place in its window of each, the same in all frames.

        Raises:
            ShapeError: tokens or offsets do not fit the grid.
        """
        check_grid(x_BND, grid)
        dropped = self._num_dropped(grid, context.step)
        if not dropped:
            return keep_all(x_BND)
        picture = (1, *grid[1:])
        window = fit_window(self.window, picture)
        if offsets is None:
            drawn = random_integers(context.step, num_windows(window, picture), device=x_BND.device)
            offsets = drawn % (window[1] * window[2])
        frames = x_BND.detach().reshape(x_BND.shape[0] * grid[0], -1, x_BND.shape[2])
        kept = _kept_by_wrong_index(frames, destinations(picture, window, offsets), dropped)
        starts = torch.arange(grid[0], device=x_BND.device).unsqueeze(1) * frames.shape[1]
        kept = (kept.view(x_BND.shape[0], grid[0], -1) + starts).flatten(1)
        out = apply_drop(x_BND, drop_others(kept, x_BND.shape[1]))
        return out._replace(tokens=out.tokens.detach() + 0.0 * out.tokens)

    def _num_dropped(self, grid: Grid, step: int | None) -> int:
        picture = (1, *grid[1:])
        num_sources = grid[1] * grid[2] - num_windows(fit_window(self.window, picture), picture)
        return min(int(self.schedule.ratio(step) * grid[1] * grid[2]), num_sources)


def _kept_by_wrong_index(x_BND: Tensor, dst: Tensor, num_dropped: int) -> Tensor:
    """Ascending positions ``(B, N - num_dropped)`` that the original kept."""
    num_batch, num_tokens, _ = x_BND.shape
    is_dst = torch.zeros(1, num_tokens, 1, dtype=torch.int64, device=x_BND.device)
    is_dst[0, dst] = -1
    # As in the original not stable, so the sources come in an order of the sort's own, which its result depends on.
    src = is_dst.argsort(dim=1).flatten()[dst.shape[0] :]
    unit = x_BND / x_BND.norm(dim=-1, keepdim=True)
    sources = gather_tokens(unit, src.expand(num_batch, -1))
    best_BS = (sources @ gather_tokens(unit, dst.expand(num_batch, -1)).transpose(1, 2)).amax(dim=2)
    dropped = best_BS.argsort(dim=1, descending=True, stable=True)[:, :num_dropped]
    stays = torch.ones(num_batch, num_tokens, device=x_BND.device).scatter(1, dropped, 0.0)
    return stays.argsort(dim=1, descending=True, stable=True)[:, : num_tokens - num_dropped]
