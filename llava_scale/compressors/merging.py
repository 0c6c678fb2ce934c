"""Tokens into groups and groups into tokens: what all merging compressors share.

Legend: ``B`` media, ``N`` tokens in, ``M`` tokens out, ``D`` width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_scale.compressors.base import CompressedTokens
from llava_scale.errors import ShapeError
from llava_scale.types import Grid


class MergePlan(NamedTuple):
    """Which tokens stay and where the others go.

    Attributes:
        kept: ``(B, M)`` int64, positions of the tokens that stay, ascending.
        group: ``(B, N)`` int64, entry of ``kept`` that each token belongs to; -1 for those that are dropped.
    """

    kept: Tensor
    group: Tensor


def check_grid(x_BND: Tensor, grid: Grid) -> None:
    """Refuse tokens that do not lie on ``grid``.

    Raises:
        ShapeError: their number is not the product of ``grid``.
    """
    frames, rows, cols = grid
    if x_BND.ndim != 3 or x_BND.shape[1] != frames * rows * cols:
        expected = f"a grid of {frames} x {rows} x {cols} needs (B, {frames * rows * cols}, D) tokens"
        raise ShapeError(f"{expected}, got {tuple(x_BND.shape)}")


def plan_merge(similarity_BN: Tensor, target_BN: Tensor, num_kept: int) -> MergePlan:
    """Join the most similar tokens with their targets until ``num_kept`` are left.

    Args:
        similarity_BN: How alike each token and its target are; ``-inf`` for tokens that must stay. At least
            ``N - num_kept`` of each row are finite. Of equal ones the first in raster order goes first.
        target_BN: Position of each token's target, which is one that must stay.
        num_kept: M.
    """
    num_batch, num_tokens = similarity_BN.shape
    order = similarity_BN.argsort(dim=1, descending=True, stable=True)
    removed, kept = order[:, : num_tokens - num_kept], order[:, num_tokens - num_kept :].sort(dim=1).values
    own = torch.arange(num_tokens, device=kept.device).expand(num_batch, -1)
    anchor = own.scatter(1, removed, target_BN.gather(1, removed))
    rank = torch.zeros_like(own).scatter(1, kept, own[:, :num_kept])
    return MergePlan(kept=kept, group=rank.gather(1, anchor))


def plan_drop(score_BN: Tensor, num_kept: int) -> MergePlan:
    """Keep the ``num_kept`` tokens with the highest score, of equal ones the first, and drop the others."""
    kept = score_BN.argsort(dim=1, descending=True, stable=True)[:, :num_kept].sort(dim=1).values
    return drop_others(kept, score_BN.shape[1])


def drop_others(kept_BM: Tensor, num_tokens: int) -> MergePlan:
    """Keep the ascending positions ``kept_BM`` of ``num_tokens`` and drop the others."""
    num_batch, num_kept = kept_BM.shape
    nowhere = torch.full((num_batch, num_tokens), -1, dtype=torch.int64, device=kept_BM.device)
    ranks = torch.arange(num_kept, device=kept_BM.device).expand(num_batch, -1)
    return MergePlan(kept=kept_BM, group=nowhere.scatter(1, kept_BM, ranks))


def keep_all(x_BND: Tensor, sizes_BN: Tensor | None = None) -> CompressedTokens:
    """Every token as it is."""
    positions = torch.arange(x_BND.shape[1], device=x_BND.device).expand(x_BND.shape[:2])
    return CompressedTokens(x_BND, positions, _ones(x_BND) if sizes_BN is None else sizes_BN, positions)


def apply_drop(x_BND: Tensor, plan: MergePlan) -> CompressedTokens:
    """The kept tokens, each standing for itself."""
    tokens = gather_tokens(x_BND, plan.kept)
    return CompressedTokens(tokens, plan.kept, _ones(tokens), plan.group)


def apply_merge(x_BND: Tensor, plan: MergePlan, sizes_BN: Tensor | None = None) -> CompressedTokens:
    """Mean of each group's tokens, weighted by their sizes (all 1 if None); differentiable in the tokens.

    Sums are taken in float32 whatever the type of the tokens.
    """
    num_kept = plan.kept.shape[1]
    of_input = _ones(x_BND) if sizes_BN is None else sizes_BN.to(_size_type(x_BND))
    sizes = of_input.new_zeros(plan.kept.shape).scatter_add(1, plan.group, of_input)
    weights = of_input / sizes.gather(1, plan.group)
    tokens: Tensor = _GroupMean.apply(x_BND, plan.group, weights, sizes_BN is None, num_kept)  # type: ignore[no-untyped-call]
    return CompressedTokens(tokens, plan.kept, sizes, plan.group)


def gather_tokens(x_BND: Tensor, positions_BM: Tensor) -> Tensor:
    """Tokens at ``positions_BM``, ``(B, M, D)``."""
    num_batch, num_tokens, width = x_BND.shape
    flat = positions_BM + _row_starts(num_batch, num_tokens, positions_BM.device)
    return x_BND.reshape(-1, width).index_select(0, flat.flatten()).view(num_batch, -1, width)


def _ones(x_BND: Tensor) -> Tensor:
    return torch.ones(x_BND.shape[:2], dtype=_size_type(x_BND), device=x_BND.device)


def _size_type(x_BND: Tensor) -> torch.dtype:
    return torch.float64 if x_BND.dtype == torch.float64 else torch.float32


def _row_starts(num_batch: int, num_tokens: int, device: torch.device) -> Tensor:
    return torch.arange(num_batch, device=device).unsqueeze(1) * num_tokens


class _GroupMean(torch.autograd.Function):
    """Weighted mean of groups in one pass over the tokens; the backward pass is one gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Tensor, weights: Tensor, equal: bool, num_groups: int) -> Tensor:
        """Means ``(B, M, D)``; ``equal`` says that weights within a group are all the same."""
        num_batch, width = x.shape[0], x.shape[2]
        flat = (group + _row_starts(num_batch, num_groups, x.device)).flatten()
        members = flat.argsort(stable=True)
        counts = torch.zeros(num_batch * num_groups, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(0, flat, torch.ones_like(flat))
        mode, per_sample = ("mean", None) if equal else ("sum", weights.flatten()[members].to(x.dtype))
        means = F.embedding_bag(
            members, x.reshape(-1, width), counts.cumsum(0) - counts, mode=mode, per_sample_weights=per_sample
        )
        ctx.equal = equal
        ctx.save_for_backward(flat, counts.reciprocal() if equal else weights)
        return means.view(num_batch, num_groups, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Each token gets its group's gradient times its weight."""
        flat, weights = ctx.saved_tensors
        of_groups = grad.reshape(-1, grad.shape[-1])
        if ctx.equal:  # all members of a group get the same: weigh before copying
            of_groups = of_groups * weights.unsqueeze(-1).to(grad.dtype)
        of_tokens = of_groups.index_select(0, flat).view(grad.shape[0], -1, grad.shape[-1])
        if not ctx.equal:
            of_tokens.mul_(weights.unsqueeze(-1).to(grad.dtype))
        return of_tokens, None, None, None, None
