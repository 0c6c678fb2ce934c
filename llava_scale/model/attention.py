"""Attention for packed rows: every sample sees itself only, and no mask is ever made.

The implementation is registered with transformers as ``"packed"`` and behaves as its ``sdpa`` for anything that is
not a packed row: padded batches, the KV cache, generation. For a packed row the offsets of the samples travel to the
attention layers as a keyword argument.

Legend: ``H`` heads, ``G`` key/value heads, ``S`` tokens in the row, ``D`` width of a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llava_scale.errors import ConfigError, ShapeError

PACKED = "packed"
"""Name of the implementation in ``attn_implementation``."""

_FLASH_TYPES = (torch.float16, torch.bfloat16)


@dataclass(slots=True)
class _PackedPass:
    """One forward pass over a packed row, from the first layer to the last."""

    num_calls: int = 0


_current_pass: ContextVar[_PackedPass | None] = ContextVar("packed_pass", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """Where the samples of a packed row lie.

    Attributes:
        cu_seq_lens: ``(K + 1,)`` int32 offsets, on the device of the row.
        lengths: Tokens of each sample, on the host.
        by_length: Order of the tokens that brings samples of one length together, and its inverse, ``(S,)`` int64 each;
            None where no two samples are equally long, or on a device whose kernel takes all lengths at once.
    """

    cu_seq_lens: Tensor
    lengths: tuple[int, ...]
    by_length: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, cu_seq_lens: Tensor, *, row_length: int, device: torch.device) -> PackedLayout:
        """Read the layout of a row of ``row_length`` tokens; waits for the device only if the offsets lie there.

        Raises:
            ShapeError: the offsets do not rise from 0 to ``row_length``.
        """
        offsets = cu_seq_lens.tolist()
        lengths = tuple(end - start for start, end in pairwise(offsets))
        if not lengths or offsets[0] != 0 or offsets[-1] != row_length or min(lengths) < 1:
            raise ShapeError(f"cu_seq_lens must rise from 0 to the row's {row_length} tokens, got {offsets[:8]}...")
        moved = cu_seq_lens.to(device=device, dtype=torch.int32, non_blocking=True)
        by_length = None
        if device.type == "cpu" and len(set(lengths)) < len(lengths):
            of_token = np.repeat(np.array(lengths), lengths)
            order = np.argsort(of_token, kind="stable")
            by_length = torch.from_numpy(order), torch.from_numpy(np.argsort(order))
        return cls(cu_seq_lens=moved, lengths=lengths, by_length=by_length)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Samples and tokens of each, for what is attended to together, in the order of ``by_length``."""
        if self.by_length is None:
            return [(1, length) for length in self.lengths]
        return [(number, length) for length, number in sorted(Counter(self.lengths).items())]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(self.lengths)

    def attention_kwargs(self, implementation: str) -> dict[str, Any]:
        """What the attention layers are given, so that ``implementation`` keeps the samples apart.

        Ours gets one opaque object: numbers would make the compiler specialise on each layout. The FlashAttention
        of transformers gets what it looks for; its other implementations read the restarting positions.
        """
        if implementation == PACKED:
            return {"packed_layout": self}
        if "flash" not in implementation:
            return {}
        ends = {"cu_seq_lens_q": self.cu_seq_lens, "cu_seq_lens_k": self.cu_seq_lens}
        return {**ends, "max_length_q": self.longest, "max_length_k": self.longest}


@contextmanager
def packed_pass(*, implementation: str) -> Iterator[None]:
    """Context of one pass of a language model over a packed row, with the attention ``implementation`` it uses.

    Raises:
        ConfigError: the language model ran without a single attention layer that knew the samples' borders, so
            samples could have seen each other.
    """
    current = _PackedPass()
    token = _current_pass.set(current)
    try:
        yield
    finally:
        _current_pass.reset(token)
    if implementation == PACKED and current.num_calls == 0:
        raise ConfigError("this language model has no attention layers that can keep packed samples apart")


def register() -> None:
    """Make ``"packed"`` known to transformers; doing it again changes nothing."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, packed_mask)


def packed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask entry: nothing for packed rows but the width of a sliding window that matters, else ``sdpa``'s mask.

    Returns:
        Inside ``packed_pass`` None, or a ``(1, 1, 1, 1)`` int64 tensor on the CPU that holds the window.

    Raises:
        ConfigError: the model restricts attention in another way than by a sliding window.
    """
    if _current_pass.get() is None:
        mask: Tensor | None = sdpa_mask(*args, **kwargs)
        return mask
    window, config = kwargs.get("local_size"), kwargs.get("config")
    if window is None or kwargs["q_length"] <= window:
        return None
    if window != getattr(config, "sliding_window", None):
        raise ConfigError(
            f"chunked attention of {window} tokens is not supported for packed rows longer than a chunk; "
            f"set data.packing.row_length to {window} or less"
        )
    return torch.full((1, 1, 1, 1), window, dtype=torch.int64, device="cpu")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention entry: causal inside each sample of a packed row, else ``sdpa``.

    Args:
        module: Attention layer that calls.
        query: ``(1, H, S, D)``.
        key: ``(1, G, S, D)`` with G a divisor of H.
        value: As ``key``.
        attention_mask: What ``packed_mask`` returned.
        dropout: Share of attention weights dropped.
        scaling: Factor on the scores; ``D ** -0.5`` if None.
        packed_layout: Where the samples lie; None for rows that are not packed.
        **kwargs: What ``sdpa`` takes.

    Returns:
        ``(1, S, H, D)`` and None.
    """
    current = _current_pass.get()
    if packed_layout is None:
        if current is not None:
            raise ConfigError(
                f"{type(module).__name__} is not told where packed samples begin: this language model does not hand "
                "keyword arguments to its attention layers and cannot be trained on packed rows"
            )
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if current is not None:
        current.num_calls += 1
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ConfigError("attention with soft-capped or biased scores is not supported for packed rows")
    return _segments(query, key, value, packed_layout, attention_mask, dropout, scaling), None


# Opaque to the compiler: a new layout of samples must not compile the layers again.
@torch.compiler.disable(recursive=True)  # type: ignore[no-untyped-call, untyped-decorator]
def _segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    window_of_layer: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    window = None if window_of_layer is None else int(window_of_layer.item())
    if query.shape[0] != 1:
        raise ShapeError(f"packed rows come one at a time, got a batch of {query.shape[0]}")
    if query.is_cuda and query.dtype in _FLASH_TYPES and dropout == 0.0:
        return _varlen(query, key, value, layout, window, scaling)
    parts = [_wide_on_cpu(part) for part in (query, key, value)]
    if layout.by_length is not None:
        parts = [part.index_select(2, layout.by_length[0]) for part in parts]
    groups = layout.groups
    split = [torch.split(part, [number * length for number, length in groups], dim=2) for part in parts]
    with torch.autocast(query.device.type, enabled=False):
        outputs = [
            _alike(*(part.unflatten(2, group) for part in pieces), window=window, dropout=dropout, scaling=scaling)
            for group, *pieces in zip(groups, *split, strict=True)
        ]
    output = torch.cat(outputs, dim=1)
    if layout.by_length is not None:
        output = output.index_select(1, layout.by_length[1])
    return output.to(query.dtype)


def _alike(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """Attention of equally long samples, ``(1, H, K, L, D)`` each, as ``(1, K * L, H, D)``."""
    batches = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    return _causal(*batches, **settings).transpose(1, 2).flatten(0, 1).unsqueeze(0)


def _wide_on_cpu(x: Tensor) -> Tensor:
    """Sixteen-bit values as float32 where they lie on a CPU, whose attention is 1.7 to 3.4 times slower with them.

    Measured forward and backward for samples of 60 to 1,500 tokens, 9 heads of 64, torch 2.13.
    """
    return x.float() if x.device.type == "cpu" else x


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, window: int | None, scaling: float | None
) -> Tensor:
    """All samples in one kernel. A window of W tokens reaches W - 1 back, the token itself being the W-th."""
    from torch.nn.attention.varlen import varlen_attn  # pulls in the compiler, seconds that a CPU run need not spend

    output = varlen_attn(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        layout.cu_seq_lens,
        layout.cu_seq_lens,
        layout.longest,
        layout.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, *, window: int | None, dropout: float, scaling: float | None
) -> Tensor:
    """Causal attention of samples with themselves, ``(K, H, L, D)`` each."""
    length = query.shape[2]
    near = None
    if window is not None and length > window:
        positions = torch.arange(length, device=query.device)
        distance = positions[:, None] - positions[None, :]
        near = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=near,
        dropout_p=dropout,
        is_causal=near is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
