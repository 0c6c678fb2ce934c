"""Some tokens stay and the others go: random and uniform pruning, DivPrune, VisionZip, static video tokens.

None has weights. Ours in all of them: tokens keep raster and time order, and the count depends on grid and step alone.

Legend: ``B`` media, ``N`` tokens in, ``M`` tokens out, ``C`` contextual tokens, ``D`` width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_scale.compressors.base import EVALUATION, CompressedTokens, Context
from llava_scale.compressors.merging import (
    MergePlan,
    apply_drop,
    check_grid,
    drop_others,
    gather_tokens,
    keep_all,
    plan_drop,
)
from llava_scale.compressors.schedule import RatioSchedule, random_integers
from llava_scale.types import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What all selections share.

    Attributes:
        schedule: Share that is removed at each step.
    """

    schedule: RatioSchedule

    @property
    def needs_instruction(self) -> bool:
        """Never."""
        return False

    @property
    def needs_signals(self) -> bool:
        """Only where a subclass says so."""
        return False

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Tokens of one medium at ``step``."""
        return self.schedule.num_kept(grid[0] * grid[1] * grid[2], step)

    def out_width(self, in_width: int) -> int:
        """As it comes in."""
        return in_width

    def __call__(self, x_BND: Tensor, grid: Grid, context: Context = EVALUATION) -> CompressedTokens:
        """Select tokens of ``x_BND``, ``(B, N, D)``, N the product of ``grid``."""
        check_grid(x_BND, grid)
        num_kept = self.num_tokens(grid, context.step)
        if num_kept == x_BND.shape[1]:
            return keep_all(x_BND)
        return apply_drop(x_BND, self.choose(x_BND.detach(), grid, num_kept, context))

    def choose(self, x_BND: Tensor, grid: Grid, num_kept: int, context: Context) -> MergePlan:
        """Which ``num_kept`` tokens stay."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomPrune(Selection):
    """Keeps places drawn afresh at each training step; at evaluation always the same.

    All media of a step lose the same places, so what happens to one does not depend on its neighbours in the batch.
    """

    def choose(self, x_BND: Tensor, grid: Grid, num_kept: int, context: Context) -> MergePlan:
        """Places with the highest random numbers."""
        drawn = random_integers(context.step, x_BND.shape[1], device=x_BND.device)
        return plan_drop(drawn.float().expand(x_BND.shape[0], -1), num_kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformPrune(Selection):
    """Keeps places at equal distances in raster order."""

    def choose(self, x_BND: Tensor, grid: Grid, num_kept: int, context: Context) -> MergePlan:
        """Middles of ``num_kept`` equal parts."""
        num_batch, num_tokens, _ = x_BND.shape
        kept = (2 * torch.arange(num_kept, device=x_BND.device) + 1) * num_tokens // (2 * num_kept)
        return drop_others(kept.expand(num_batch, -1), num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class DivPrune(Selection):
    """Keeps the tokens that are most unlike each other (max-min diversity; arXiv:2503.02175 §3).

    Holds the distances of all pairs, ``(B, N, N)``.
    """

    def choose(self, x_BND: Tensor, grid: Grid, num_kept: int, context: Context) -> MergePlan:
        """The diverse tokens, in raster order."""
        return drop_others(most_diverse(x_BND, num_kept).sort(dim=1).values, x_BND.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalPrune(Selection):
    """Drops the video tokens that change least from one frame to the next; the first frame stays whole.

    EVS (arXiv:2510.14624) with ``measure="cosine"``; ``l1`` is the mean absolute difference that VideoLLaMA 3's DiffFP
    (arXiv:2501.13106 §2.1) takes of pixels. Ours ranks over the whole clip instead of comparing with a threshold, so
    that the count is known. A picture is one frame and keeps all tokens.

    Attributes:
        measure: How change is measured.
    """

    measure: Literal["cosine", "l1"] = "cosine"

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Tokens of one medium at ``step``: at least one whole frame."""
        return self.schedule.num_kept(grid[0] * grid[1] * grid[2], step, least=grid[1] * grid[2])

    def choose(self, x_BND: Tensor, grid: Grid, num_kept: int, context: Context) -> MergePlan:
        """The tokens that change most."""
        return plan_drop(temporal_change(x_BND, grid, self.measure), num_kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionZip(Selection):
    """Keeps the patches that the class token attends to, and merges the others into a few contextual tokens.

    VisionZip (arXiv:2412.04467 §3). As in its code, a contextual token is its target plus the mean of those that join
    it. Ours: dominant and contextual tokens together stand in raster order, and there is no class token among them.

    Attributes:
        contextual_share: Share of the kept tokens that are contextual; at least one is.
    """

    contextual_share: float = 0.15625

    @property
    def needs_signals(self) -> bool:
        """Keys and saliency decide."""
        return True

    def __call__(self, x_BND: Tensor, grid: Grid, context: Context = EVALUATION) -> CompressedTokens:
        """Select and merge tokens of ``x_BND``, ``(B, N, D)``, N the product of ``grid``."""
        check_grid(x_BND, grid)
        num_kept = self.num_tokens(grid, context.step)
        if num_kept == x_BND.shape[1]:
            return keep_all(x_BND)
        assert context.signals is not None, "VisionZip needs the tower's signals"
        num_contextual = max(1, round(num_kept * self.contextual_share))
        return zip_tokens(x_BND, *context.signals, num_kept - num_contextual, num_contextual)


@torch.no_grad()
def most_diverse(x_BND: Tensor, num_kept: int) -> Tensor:
    """Positions ``(B, num_kept)`` of tokens in the order in which they are picked.

    The first is the one farthest from its nearest neighbour, each further one that farthest from all before it.
    """
    unit = F.normalize(x_BND, dim=-1)
    distance = 1.0 - unit @ unit.transpose(1, 2)
    itself = torch.eye(x_BND.shape[1], dtype=torch.bool, device=x_BND.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(dim=1)
    picked = []
    for number in range(num_kept):
        newest = nearest.argmax(dim=1)
        picked.append(newest)
        to_newest = distance.gather(1, newest.view(-1, 1, 1).expand(-1, 1, distance.shape[2])).squeeze(1)
        nearest = to_newest if number == 0 else torch.minimum(nearest, to_newest)
        nearest = nearest.scatter(1, newest.unsqueeze(1), -torch.inf)
    return torch.stack(picked, dim=1)


@torch.no_grad()
def temporal_change(x_BND: Tensor, grid: Grid, measure: Literal["cosine", "l1"]) -> Tensor:
    """How much each token differs from the one at its place in the frame before, ``(B, N)``; the first frame inf."""
    frames = x_BND.reshape(x_BND.shape[0], grid[0], -1, x_BND.shape[2])
    before, after = frames[:, :-1], frames[:, 1:]
    if measure == "cosine":
        change = 1.0 - F.cosine_similarity(after, before, dim=-1)
    else:
        change = (after - before).abs().mean(dim=-1)
    first = change.new_full((*frames[:, :1].shape[:3],), torch.inf)
    return torch.cat([first, change], dim=1).flatten(1)


def zip_tokens(
    x_BND: Tensor, keys_BNK: Tensor, saliency_BN: Tensor, num_dominant: int, num_contextual: int
) -> CompressedTokens:
    """The dominant tokens, and contextual ones made of the rest, in raster order of dominant tokens and targets."""
    num_batch, num_tokens, _ = x_BND.shape
    dominant = saliency_BN.topk(num_dominant, dim=1).indices
    is_rest = torch.ones(num_batch, num_tokens, device=x_BND.device).scatter(1, dominant, 0.0)
    rest = is_rest.argsort(dim=1, descending=True, stable=True)[:, : num_tokens - num_dominant]  # raster order
    spacing = max(1, rest.shape[1] // max(num_contextual, 1))
    is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=x_BND.device)
    is_target[: spacing * num_contextual : spacing] = True
    targets, joining = rest[:, is_target], rest[:, ~is_target]
    keys = F.normalize(keys_BNK.detach(), dim=-1)
    alike = gather_tokens(keys, joining) @ gather_tokens(keys, targets).transpose(1, 2)
    member_BRC = F.one_hot(alike.argmax(dim=2), num_contextual).to(x_BND.dtype)
    counts = member_BRC.sum(dim=1)
    means = member_BRC.transpose(1, 2) @ gather_tokens(x_BND, joining) / counts.clamp(min=1).unsqueeze(-1)
    tokens = torch.cat([gather_tokens(x_BND, dominant), gather_tokens(x_BND, targets) + means], dim=1)
    anchors, order = torch.cat([dominant, targets], dim=1).sort(dim=1)
    sizes = torch.cat([counts.new_ones(num_batch, num_dominant), counts + 1], dim=1).gather(1, order).float()
    rank = torch.zeros_like(is_rest, dtype=torch.int64)
    rank = rank.scatter(1, anchors, torch.arange(anchors.shape[1], device=x_BND.device).expand(num_batch, -1))
    joined = targets.gather(1, alike.argmax(dim=2))
    group = rank.scatter(1, joining, rank.gather(1, joined))
    return CompressedTokens(gather_tokens(tokens, order), anchors, sizes, group)
