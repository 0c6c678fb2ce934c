"""Windowed attention to tokens after their layer norm and with their positions, neither of which is made as a whole.

Legend: ``B`` media, ``Q`` queries, ``N`` tokens, ``D`` their width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llava_scale.compressors.positions import position_parts
from llava_scale.compressors.window_attention import Windows, groups, seen_by
from llava_scale.types import Grid

_PIECE = 1024
"""Tokens whose gradients go through the norm at a time."""


def normed_attention(
    query: Tensor, placed_query: Tensor | None, x_BND: Tensor, grid: Grid, windows: Windows, *, eps: float
) -> Tensor:
    """What each query collects of the normalised tokens in its window.

    The score of a token is ``query`` times the token after a layer norm without weights, plus ``placed_query`` times
    its position (``sincos_position``). As ``window_attention``, in groups of neighbouring queries; besides, only a
    group's tokens are normalised at a time, and the backward pass does it again.

    Args:
        query: ``(B, Q, D)``; scores are not scaled further.
        placed_query: ``(B, Q, D)``; None to leave positions out.
        x_BND: Tokens.
        grid: Frames, rows and columns.
        windows: One for each query, none empty.
        eps: Of the norm.

    Returns:
        ``(B, Q, D)`` in the type of ``query``, the mean of the normalised tokens by the weights of attention.
    """
    looked: Tensor = _NormedAttention.apply(query, placed_query, x_BND, grid, windows, eps)  # type: ignore[no-untyped-call]
    return looked


def normed_means(x_BND: Tensor, windows: Windows, *, eps: float) -> Tensor:
    """Mean of the normalised tokens in each window, ``(B, Q, D)``."""
    nothing = x_BND.new_zeros(x_BND.shape[0], len(windows), x_BND.shape[2])
    return normed_attention(nothing, None, x_BND, (1, 1, x_BND.shape[1]), windows, eps=eps)


class _NormedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, placed: Tensor | None, x: Tensor, grid: Grid, windows: Windows, eps: float
    ) -> Tensor:
        """Outputs ``(B, Q, D)``."""
        parts, weights = [], []
        with torch.autocast(x.device.type, enabled=False):
            for queries, tokens, inside in groups(windows):
                near = _normed(x, tokens, eps)[0]
                scores = torch.bmm(query[:, queries].to(near.dtype), near.transpose(1, 2))
                if placed is not None:
                    has, adds = position_parts(grid, range(tokens.start, tokens.stop), x.shape[2], like=near)
                    scores += placed[:, queries].to(near.dtype) @ adds.T @ has.T
                seen = seen_by(inside, near.shape[1], x.device)
                if seen is not None:
                    scores.masked_fill_(~seen, -torch.inf)
                weights.append(scores.softmax(dim=-1))
                parts.append(torch.bmm(weights[-1], near))
        ctx.save_for_backward(query, placed, x, *weights)
        ctx.settings = grid, windows, eps
        return torch.cat(parts, dim=1).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both queries and of the tokens."""
        query, placed, x, *weights = ctx.saved_tensors
        grid, windows, eps = ctx.settings
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        of_query, of_placed = torch.empty_like(query), None if placed is None else torch.empty_like(placed)
        of_x = torch.zeros_like(x, dtype=wide) if ctx.needs_input_grad[2] else None
        for (queries, tokens, _), weight in zip(groups(windows), weights, strict=True):
            near, of_out = _normed(x, tokens, eps)[0], grad[:, queries].to(wide)
            of_weight = torch.bmm(of_out, near.transpose(1, 2)).mul_(weight)
            of_scores = of_weight.sub_(weight * of_weight.sum(dim=-1, keepdim=True))
            of_query[:, queries] = torch.bmm(of_scores, near).to(query.dtype)
            if of_placed is not None:
                has, adds = position_parts(grid, range(tokens.start, tokens.stop), x.shape[2], like=near)
                of_placed[:, queries] = (of_scores @ has @ adds).to(placed.dtype)
            if of_x is not None:
                of_x[:, tokens].baddbmm_(of_scores.transpose(1, 2), query[:, queries].to(wide))
                of_x[:, tokens].baddbmm_(weight.transpose(1, 2), of_out)
        return of_query, of_placed, _through_norm(of_x, x, eps), None, None, None


def _normed(x_BND: Tensor, tokens: slice, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Some tokens after a layer norm without weights, at least float32; their means and reciprocal deviations."""
    near = x_BND[:, tokens]
    near = near if near.dtype == torch.float64 else near.float()
    return torch.native_layer_norm(near, near.shape[2:], None, None, eps)


def _through_norm(of_normed: Tensor | None, x_BND: Tensor, eps: float) -> Tensor | None:
    """Gradient of the tokens from that of the normalised ones, which is overwritten."""
    if of_normed is None:
        return None
    for start in range(0, x_BND.shape[1], _PIECE):
        piece = slice(start, start + _PIECE)
        normed, _, reciprocal = _normed(x_BND, piece, eps)
        grad = of_normed[:, piece]
        along = normed * (grad * normed).mean(dim=-1, keepdim=True)
        grad.sub_(grad.mean(dim=-1, keepdim=True)).sub_(along).mul_(reciprocal)
    return of_normed.to(x_BND.dtype)
