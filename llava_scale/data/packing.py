"""Choosing the samples of each row.

A pool holds a few rows' worth of samples in the order of their arrival. A row starts with the oldest of them and is
finished with the ones that fill it best, so rows are full and no sample waits long.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from llava_scale.data.cursor import Draw
    from llava_scale.data.order import IntArray

_ARRIVAL_BITS = 40
_ARRIVAL_MASK = (1 << _ARRIVAL_BITS) - 1
_LEFT_FOR_THE_END = 2.0  # mean lengths kept free for the search that finishes a row; filled best of 1.5 to 4.5
_MAX_SHORTEST = 3  # shortest samples tried before the last one or two
_TOLERANCE = 1 / 1000  # of a row; closer is not searched for


class Pool(Protocol):
    """Samples that wait for a row."""

    def add(self, draw: Draw, length: int) -> None:
        """Let a sample wait; ``length`` is at most a row's."""
        ...

    def ready(self) -> bool:
        """Whether a row can be taken without looking further ahead."""
        ...

    def take(self) -> list[Draw]:
        """Remove and return one row's samples in the order of their arrival; empty if none wait."""
        ...

    def draws(self) -> list[Draw]:
        """The waiting samples in the order of their arrival; a pool refilled with them goes on alike."""
        ...

    def remeasure(self, length_of: Callable[[Draw], int | None]) -> list[Draw]:
        """Give every sample a new length; remove and return those for which there is none."""
        ...


class CountPool:
    """Rows of a fixed number of samples, first come first served."""

    def __init__(self, samples_per_row: int) -> None:
        self._size = samples_per_row
        self._waiting: list[Draw] = []

    def add(self, draw: Draw, length: int) -> None:
        """Let a sample wait; its length does not matter."""
        self._waiting.append(draw)

    def ready(self) -> bool:
        """Whether a whole row waits."""
        return len(self._waiting) >= self._size

    def take(self) -> list[Draw]:
        """Remove and return the oldest samples, at most a row's."""
        row, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return row

    def draws(self) -> list[Draw]:
        """The waiting samples in the order of their arrival."""
        return list(self._waiting)

    def remeasure(self, length_of: Callable[[Draw], int | None]) -> list[Draw]:
        """Nothing to do: lengths do not matter."""
        return []


class TokenPool:
    """Rows of at most ``row_length`` tokens.

    The oldest sample always enters the next row, so a sample waits for at most as many rows as the pool holds samples.
    The end of a row is searched: up to three of the shortest samples and the best one or two of all others.

    Args:
        row_length: Tokens that a row holds.
        lookahead_rows: Rows' worth of tokens to choose from.
    """

    def __init__(self, row_length: int, lookahead_rows: int) -> None:
        self._capacity = row_length
        self._target = row_length * lookahead_rows
        self._tolerance = int(row_length * _TOLERANCE)
        self._clear()

    def _clear(self) -> None:
        self._draws: dict[int, tuple[Draw, int]] = {}  # by arrival, oldest first
        self._keys = array("q")  # length and arrival in one integer, sorted: shortest first
        self._arrivals = 0
        self._num_tokens = 0

    def add(self, draw: Draw, length: int) -> None:
        """Let a sample of ``length`` tokens wait."""
        insort(self._keys, length << _ARRIVAL_BITS | self._arrivals)
        self._draws[self._arrivals] = (draw, length)
        self._arrivals += 1
        self._num_tokens += length

    def ready(self) -> bool:
        """Whether enough samples wait to choose well."""
        return self._num_tokens >= self._target

    def draws(self) -> list[Draw]:
        """The waiting samples in the order of their arrival."""
        return [draw for draw, _ in self._draws.values()]

    def remeasure(self, length_of: Callable[[Draw], int | None]) -> list[Draw]:
        """Give every sample a new length; remove and return those for which there is none."""
        waiting = [(draw, length, length_of(draw)) for draw, length in self._draws.values()]
        if all(old == new for _, old, new in waiting):
            return []
        self._clear()
        for draw, _, length in waiting:
            if length is not None:
                self.add(draw, length)
        return [draw for draw, _, length in waiting if length is None]

    def take(self) -> list[Draw]:
        """Remove and return the samples of one row in the order of their arrival."""
        if self._num_tokens <= self._capacity:
            row = self.draws()
            self._clear()
            return row
        margin = _LEFT_FOR_THE_END * self._num_tokens / len(self._draws)
        room = self._capacity
        chosen: list[int] = []
        for arrival, (_, length) in self._draws.items():
            if chosen and room - length < margin:
                break
            chosen.append(arrival)
            room -= length
        taken = {arrival: self._remove(arrival) for arrival in chosen}
        taken |= {arrival: self._remove(arrival) for arrival in self._finish(room)}
        return [taken[arrival] for arrival in sorted(taken)]

    def _remove(self, arrival: int) -> Draw:
        draw, length = self._draws.pop(arrival)
        self._keys.pop(bisect_left(self._keys, length << _ARRIVAL_BITS | arrival))
        self._num_tokens -= length
        return draw

    def _finish(self, room: int) -> list[int]:
        """Arrivals of the samples that fill ``room`` best."""
        keys = np.array(self._keys, dtype=np.int64)
        lengths = keys >> _ARRIVAL_BITS
        gap, best = room, np.empty(0, dtype=np.int64)
        for num_shortest in range(min(_MAX_SHORTEST, len(keys)) + 1):
            if num_shortest:
                room -= int(lengths[num_shortest - 1])
            if room < 0 or gap <= self._tolerance:
                break
            left, pair = _best_pair(lengths[num_shortest:], room)
            if left < gap:
                gap, best = left, np.concatenate([np.arange(num_shortest), np.asarray(pair, np.int64) + num_shortest])
        return [int(key) & _ARRIVAL_MASK for key in keys[best]]


def _best_pair(lengths: IntArray, room: int) -> tuple[int, tuple[int, ...]]:
    """Positions in ascending ``lengths`` of the one or two that fill ``room`` best, and the tokens left over."""
    last = int(np.searchsorted(lengths, room, side="right")) - 1
    if last < 0:
        return room, ()
    single = room - int(lengths[last])
    partner = np.minimum(np.searchsorted(lengths, room - lengths, side="right"), np.arange(len(lengths))) - 1
    sums = np.where(partner >= 0, lengths + lengths[partner], -1)  # partner: the longest that fits and stands before
    first = int(sums.argmax())
    if 0 <= room - int(sums[first]) < single:
        return room - int(sums[first]), (int(partner[first]), first)
    return single, (last,)
