"""Attention of each query to its own window of the tokens, without copies of the windows.

Legend: ``B`` media, ``H`` heads, ``Q`` queries, ``N`` tokens, ``D`` width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Windows = tuple[range, ...]
"""Tokens that each query sees; starts never fall."""

DENSE_UP_TO = 5
"""Tokens, in widths of a window, up to which all scores under a mask are cheaper than several calls (measured)."""


def query_windows(*, num_tokens: int, num_queries: int, width: int) -> Windows:
    """Windows of equal width at equal distances, from the first token to the last.

    Every token is seen: windows become wider where ``width`` times ``num_queries`` is less than ``num_tokens``, and one
    query alone sees everything. Real-valued starts are rounded down, so windows keep the order of the queries.
    """
    if num_queries == 1:
        return (range(num_tokens),)
    width = min(max(width, -(-num_tokens // num_queries)), num_tokens)
    starts = (number * (num_tokens - width) // (num_queries - 1) for number in range(num_queries))
    return tuple(range(start, start + width) for start in starts)


def legacy_windows(*, num_tokens: int, num_queries: int, width: int) -> Windows:
    """Windows of the original, quirks included: its whole-number distance leaves tokens at the end unseen.

    Fewer tokens than ``width`` make a negative start, which counts from the end as in Python's slices.
    """
    distance = max(1, (num_tokens - width) // (num_queries - 1))
    starts = (min(number * distance, num_tokens - width) for number in range(num_queries))
    return tuple(range(*slice(start, start + width).indices(num_tokens)) for start in starts)


def window_attention(query: Tensor, key: Tensor, value: Tensor, windows: Windows) -> Tensor:
    """Scaled dot-product attention in which query i sees the tokens ``windows[i]`` only.

    Few tokens take one call under a mask. Many are taken in groups of neighbouring queries whose windows together
    span at most two widths; each group reads its part of keys and values where it lies, and adds its gradients there.
    So neither pass holds anything of the size of the copied windows.

    Args:
        query: ``(B, H, Q, D)``.
        key: ``(B, H, N, D)``.
        value: As ``key``.
        windows: One for each query, none empty.

    Returns:
        ``(B, H, Q, D)``.
    """
    first, last = windows[0].start, max(window.stop for window in windows)
    if last - first > DENSE_UP_TO * max(map(len, windows)):
        output: Tensor = _GroupedAttention.apply(query, key, value, windows)  # type: ignore[no-untyped-call]
        return output
    inside = [range(window.start - first, window.stop - first) for window in windows]
    return _attend(query, key[:, :, first:last], value[:, :, first:last], inside)


def window_weights(query: Tensor, key: Tensor, windows: Windows) -> Tensor:
    """Weights that ``window_attention`` gives the tokens, ``(B, H, Q, N)``; to look at, as they are large."""
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    mask = seen_by(windows, key.shape[2], key.device)
    seen = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return F.softmax(seen, dim=-1, dtype=torch.float32)


def seen_by(windows: Sequence[range], num_tokens: int, device: torch.device) -> Tensor | None:
    """``(Q, N)`` bool, true where a query sees a token; None if all see all."""
    if all(len(window) == num_tokens for window in windows):
        return None
    starts = torch.tensor([window.start for window in windows], device=device).unsqueeze(1)
    stops = torch.tensor([window.stop for window in windows], device=device).unsqueeze(1)
    place = torch.arange(num_tokens, device=device)
    return (place >= starts) & (place < stops)


def groups(windows: Sequence[range]) -> list[tuple[slice, slice, list[range]]]:
    """Neighbouring queries, the tokens that they see together, and their windows within these."""
    groups = []
    begin = 0
    while begin < len(windows):
        start, end = windows[begin].start, begin + 1
        limit = start + 2 * len(windows[begin])
        while end < len(windows) and windows[end].stop <= limit:
            end += 1
        inside = [range(window.start - start, window.stop - start) for window in windows[begin:end]]
        groups.append((slice(begin, end), slice(start, windows[end - 1].stop), inside))
        begin = end
    return groups


class _GroupedAttention(torch.autograd.Function):
    """A few products for each group of queries, in at least float32; gradients are added where they belong."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, windows: Windows) -> Tensor:
        """Outputs ``(B, H, Q, D)``."""
        parts, weights = [], []
        with torch.autocast(query.device.type, enabled=False):
            for queries, tokens, inside in groups(windows):
                near = _heads(key, tokens)
                scores = torch.bmm(_heads(query, queries) * query.shape[-1] ** -0.5, near.transpose(1, 2))
                seen = seen_by(inside, near.shape[1], query.device)
                if seen is not None:
                    scores.masked_fill_(~seen, -torch.inf)
                weights.append(scores.softmax(dim=-1))
                parts.append(torch.bmm(weights[-1], _heads(value, tokens)))
        ctx.save_for_backward(query, key, value, *weights)
        ctx.windows = windows
        return torch.cat(parts, dim=1).view(*query.shape[:3], value.shape[3]).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        query, key, value, *weights = ctx.saved_tensors
        wide = weights[0].dtype
        scale = query.shape[-1] ** -0.5
        of_query = torch.empty(query.shape, dtype=wide, device=query.device)
        of_key, of_value = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (key, value))
        at = {id(x): x.flatten(0, 1) for x in (of_query, of_key, of_value)}  # views: gradients are written through them
        for (queries, tokens, _), weight in zip(groups(ctx.windows), weights, strict=True):
            of_out = _heads(grad, queries)
            of_weight = torch.bmm(of_out, _heads(value, tokens).transpose(1, 2)).mul_(weight)
            of_scores = of_weight.sub_(weight * of_weight.sum(dim=-1, keepdim=True)).mul_(scale)
            at[id(of_query)][:, queries] = torch.bmm(of_scores, _heads(key, tokens))
            at[id(of_key)][:, tokens].baddbmm_(of_scores.transpose(1, 2), _heads(query, queries))
            at[id(of_value)][:, tokens].baddbmm_(weight.transpose(1, 2), of_out)
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None


def _heads(x_BHND: Tensor, places: slice) -> Tensor:
    """``(B * H, ., D)`` of some tokens or queries, at least float32; a view where it can be."""
    near = x_BHND[:, :, places].flatten(0, 1)
    return near if near.dtype == torch.float64 else near.float()


def _attend(query: Tensor, key: Tensor, value: Tensor, windows: Sequence[range]) -> Tensor:
    mask = seen_by(windows, key.shape[2], query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
