"""Keys and values of the conversations that are being answered, one row of one tensor each.

Rows are filled from position 0 and have lengths of their own, so conversations join and leave at any step without
moving the others. Active rows are always the first ones: where one leaves, the last takes its place.

Legend: ``B`` active rows, ``R`` rows there is room for, ``H`` key/value heads, ``L`` positions, ``D`` width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

if TYPE_CHECKING:
    from collections.abc import Sequence

GROWTH = 64
"""Room grows in steps of at least this many positions."""


@dataclass(frozen=True, slots=True)
class LayerStates:
    """Keys and values ``(H, L, D)`` of one conversation in one layer."""

    keys: Tensor
    values: Tensor


class Slots(Cache):  # type: ignore[misc]
    """Cache of a decoding step: one new token for each active row.

    Attributes:
        lengths: Tokens that each active row holds.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.layers: list[SlotLayer]
        self.lengths: list[int] = []
        self.rows = torch.empty(0, dtype=torch.int64)
        self.ends = torch.empty(0, dtype=torch.int64)

    def join(self, cache: Cache, number: int, length: int) -> None:
        """Give row ``number`` of ``cache``, whose last ``length`` positions count, the next row here."""
        row = len(self.lengths)
        if not self.layers:
            self.layers = [SlotLayer(self) for _ in cache.layers]
        for own, other in zip(self.layers, cache.layers, strict=True):
            own.put(row, other.keys[number, :, -length:], other.values[number, :, -length:])
        self.lengths.append(length)

    def leave(self, row: int) -> int:
        """Give up ``row``; return the number of the row that takes its place (itself if it was the last)."""
        last = len(self.lengths) - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row, self.lengths[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        return last

    def states(self, row: int) -> list[LayerStates]:
        """Copies of what ``row`` holds."""
        length = self.lengths[row]
        return [
            LayerStates(layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone())
            for layer in self.layers
        ]

    def open_step(self, device: torch.device) -> None:
        """Make ready for one token more in each row."""
        self.rows = torch.arange(len(self.lengths), device=device)
        self.ends = torch.tensor(self.lengths, device=device)
        for layer in self.layers:
            layer.make_room(len(self.lengths), max(self.lengths) + 1)

    def close_step(self) -> None:
        """Count the token that each row has got."""
        self.lengths = [length + 1 for length in self.lengths]

    def clear(self) -> None:
        """Give up all rows and their memory."""
        self.layers, self.lengths = [], []

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """What each row's new token sees, ``(B, 1, 1, L)``: 0, or the least number where nothing is seen.

        Args:
            dtype: Of the attention scores.
            window: Tokens, the new one included, that a sliding layer sees; None for all.
        """
        place = torch.arange(max(self.lengths) + 1, device=self.ends.device)
        ends = self.ends[:, None]
        hidden = place > ends
        if window is not None:
            hidden |= place <= ends - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of ``Slots``."""

    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.is_initialized: bool
        self._slots = slots
        self.keys: Tensor
        self.values: Tensor

    def put(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Fill ``row`` from its beginning with ``(H, L, D)``."""
        if not self.is_initialized:
            self.keys, self.values = (part.new_empty((0, part.shape[0], 0, part.shape[2])) for part in (keys, values))
            self.is_initialized = True
        length = keys.shape[1]
        self.make_room(row + 1, length + 1)
        self.keys[row, :, :length], self.values[row, :, :length] = keys, values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row over another."""
        for part in (self.keys, self.values):
            part[target, :, :length] = part[source, :, :length]

    def make_room(self, num_rows: int, length: int) -> None:
        """Hold at least ``num_rows`` rows of ``length``."""
        rows, _, room, _ = self.keys.shape
        if num_rows <= rows and length <= room:
            return
        if num_rows > rows:
            rows = max(num_rows, 2 * rows)
        if length > room:
            room = max(-(-length // GROWTH) * GROWTH, room + room // 2)
        self.keys, self.values = (_grown(part, rows, room) for part in (self.keys, self.values))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: rows are filled by ``put`` before the first step."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add one token ``(B, H, 1, D)`` to each row; return all that the rows hold, ``(B, H, L, D)``."""
        slots = self._slots
        count, length = len(slots.lengths), max(slots.lengths) + 1
        self.keys[slots.rows, :, slots.ends] = key_states[:, :, 0]
        self.values[slots.rows, :, slots.ends] = value_states[:, :, 0]
        return self.keys[:count, :, :length], self.values[:count, :, :length]

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return max(self._slots.lengths, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for masks, which are made by ``Slots.mask``."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1


def cache_of(states: Sequence[LayerStates], length: int) -> DynamicCache:
    """Cache of one row that holds the first ``length`` positions of ``states``."""
    cache = DynamicCache()
    for number, layer in enumerate(states):
        cache.update(layer.keys[None, :, :length], layer.values[None, :, :length], number)
    return cache


def _grown(part: Tensor, rows: int, room: int) -> Tensor:
    # zeros: what a row has not filled is masked, but a NaN left in memory would come through
    larger = part.new_zeros((rows, part.shape[1], room, part.shape[3]))
    larger[: part.shape[0], :, : part.shape[2]] = part
    return larger
