"""One data set as a sequence of samples: its order, its half of a held-out split, and what planning must know."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llava_scale.data.index import heldout_mask
from llava_scale.data.lengths import by_shard
from llava_scale.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava_scale.data.dataset import ShardedDataset
    from llava_scale.data.lengths import TextLengths
    from llava_scale.data.order import IntArray, Order
    from llava_scale.types import MediaInfo

_CHUNK = 1024

BoolArray = NDArray[np.bool_]


class Draw(NamedTuple):
    """One use of one sample."""

    source: int
    """Number of its data set."""
    position: int
    """Where it stands in the data set's endless sequence."""
    number: int
    """Sample number inside the data set."""
    text_length: int
    """Tokens without media, ``UNREADABLE`` for a bad record, 0 where lengths are not planned on."""
    media: tuple[MediaInfo, ...]
    """Its media; empty where lengths are not planned on."""


class Cursor:
    """Walks through one data set; once ``seek`` was called, ``position`` points to a sample of the wanted part.

    Args:
        source: Number of the data set in its mixture.
        dataset: Where the samples are.
        order: Their sequence.
        lengths: Lengths of their text; None where rows are planned by counting samples.
        held_out: Share of the keys that is held out, in [0, 1).
        part: ``train`` leaves the held-out samples aside, ``eval`` takes only them; with ``held_out`` 0 both take all.
        limit: Position to stop at; None never stops.
    """

    def __init__(
        self,
        source: int,
        dataset: ShardedDataset,
        order: Order,
        lengths: TextLengths | None,
        *,
        held_out: float = 0.0,
        part: str = "train",
        limit: int | None = None,
    ) -> None:
        self.source = source
        self.dataset = dataset
        self.order = order
        self._lengths = lengths
        self._share = held_out
        self._wants_held_out = part == "eval"
        self._limit = limit
        self._queue: list[Draw] = []  # the next draws, last one first
        self.position = 0

    @property
    def exhausted(self) -> bool:
        """Whether the limit was reached."""
        return self._limit is not None and self.position >= self._limit

    def seek(self, position: int) -> None:
        """Continue at the first wanted sample at or after ``position``."""
        self._queue.clear()
        self._refill(position)

    def take(self) -> Draw:
        """Return the draw at ``position`` and move to the next one."""
        draw = self._queue.pop()
        if self._queue:
            self.position = self._queue[-1].position
        else:
            self._refill(draw.position + 1)
        return draw

    def draws_at(self, positions: Sequence[int]) -> list[Draw]:
        """Return the draws at any positions, in their order, without moving."""
        numbers = np.empty(len(positions), dtype=np.int64)
        start, window = 0, np.empty(0, dtype=np.int64)
        for slot in sorted(range(len(positions)), key=positions.__getitem__):
            position = positions[slot]
            if not start <= position < start + len(window):
                start, window = self.order.window(position)
            numbers[slot] = window[position - start]
        return self._draws(np.asarray(positions, dtype=np.int64), numbers)

    def draws_of(self, numbers: IntArray) -> list[Draw]:
        """Return what planning must know of any samples, as if they stood at position 0."""
        return self._draws(np.zeros(len(numbers), dtype=np.int64), numbers)

    @property
    def is_split(self) -> bool:
        """Whether only a part of the data set is wanted."""
        return self._share > 0

    def wanted_in_shard(self, shard: int) -> BoolArray:
        """Which samples of a shard belong to this cursor's part of the split."""
        held_out = heldout_mask(self.dataset.index(shard).key_hashes, self._share)
        return held_out if self._wants_held_out else ~held_out

    def wanted(self, numbers: IntArray) -> BoolArray:
        """Which of the samples belong to this cursor's part of the split."""
        if not self._share:
            return np.ones(len(numbers), dtype=bool)
        mask = np.empty(len(numbers), dtype=bool)
        for group in by_shard(self.dataset, numbers):
            mask[group.where] = self.wanted_in_shard(group.shard)[group.inside]
        return mask

    def _refill(self, position: int) -> None:
        """Queue the rest of the window at ``position``, or of the first later one that holds a wanted sample."""
        unseen_from = position
        while self._limit is None or position < self._limit:
            start, window = self.order.window(position)
            numbers = window[position - start :][:_CHUNK]
            positions = np.arange(position, position + len(numbers))
            mask = self.wanted(numbers)
            position += len(numbers)
            if mask.any():
                self._queue = self._draws(positions[mask], numbers[mask])[::-1]
                self.position = self._queue[-1].position
                return
            if self._limit is None and position - unseen_from > 2 * self.order.num_samples:
                raise ConfigError(
                    f"data set {self.dataset.name!r}: data.holdout={self._share} leaves none of its "
                    f"{self.order.num_samples} samples for training"
                )
        self.position = position

    def _draws(self, positions: IntArray, numbers: IntArray) -> list[Draw]:
        if self._lengths is None:
            return [Draw(self.source, *pair, 0, ()) for pair in zip(positions.tolist(), numbers.tolist(), strict=True)]
        media: list[tuple[MediaInfo, ...]] = [()] * len(numbers)
        for group in by_shard(self.dataset, numbers):
            infos = self.dataset.index(group.shard).media_infos_of(group.inside)
            for where, of_sample in zip(group.where.tolist(), infos, strict=True):
                media[where] = of_sample
        columns = (positions.tolist(), numbers.tolist(), self._lengths.of(numbers).tolist(), media)
        return [Draw(self.source, *row) for row in zip(*columns, strict=True)]
