"""Attention of each query to its own window of the tokens, without copies of the windows.

Legend: ``B`` media, ``H`` heads, ``Q`` queries, ``N`` tokens, ``D`` width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    span at most two widths; each group reads its part of keys and values where it lies. The backward pass computes a
    group's scores again and adds its gradients in place, so neither pass holds anything of the size of the copied
    windows.

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
    mask = _mask(windows, key.shape[2], key.device)
    seen = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return F.softmax(seen, dim=-1, dtype=torch.float32)


def _mask(windows: Sequence[range], num_tokens: int, device: torch.device) -> Tensor | None:
    """``(Q, N)`` bool, true where a query sees a token; None if all see all."""
    if all(len(window) == num_tokens for window in windows):
        return None
    starts = torch.tensor([window.start for window in windows], device=device).unsqueeze(1)
    stops = torch.tensor([window.stop for window in windows], device=device).unsqueeze(1)
    place = torch.arange(num_tokens, device=device)
    return (place >= starts) & (place < stops)


def _groups(windows: Sequence[range]) -> list[tuple[slice, slice, list[range]]]:
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
    """One call of attention for each group of queries."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, windows: Windows) -> Tensor:
        """Outputs ``(B, H, Q, D)``."""
        ctx.save_for_backward(query, key, value)
        ctx.windows = windows
        parts = []
        for queries, tokens, inside in _groups(windows):
            parts.append(_attend(query[:, :, queries], key[:, :, tokens], value[:, :, tokens], inside))
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        query, key, value = ctx.saved_tensors
        grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for queries, tokens, inside in _groups(ctx.windows):
            places = (queries, tokens, tokens)
            inputs = [x[:, :, at].detach().requires_grad_() for x, at in zip((query, key, value), places, strict=True)]
            with torch.enable_grad():
                output = _attend(inputs[0], inputs[1], inputs[2], inside)
            of_inputs = torch.autograd.grad(output, inputs, grad[:, :, queries])
            grads[0][:, :, queries] = of_inputs[0]
            grads[1][:, :, tokens] += of_inputs[1]
            grads[2][:, :, tokens] += of_inputs[2]
        return *grads, None


def _attend(query: Tensor, key: Tensor, value: Tensor, windows: Sequence[range]) -> Tensor:
    mask = _mask(windows, key.shape[2], query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
