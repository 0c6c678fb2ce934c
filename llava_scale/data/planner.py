"""The global sequence of rows, planned on lengths alone: the same on every rank.

Row ``n`` belongs to step ``n // rows_per_step``, so token counts that change with the step are known when the row is
filled. Rows never mix epochs: at the end of one (of the mixture, for several data sets: as many samples as all have
together) the waiting samples are laid out before the next is begun.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from llava_scale.data.lengths import UNREADABLE
from llava_scale.data.mixing import Mixture
from llava_scale.errors import SampleError
from llava_scale.types import MediaInfo

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llava_scale.data.cursor import Cursor, Draw
    from llava_scale.data.packing import Pool

CountTokens = Callable[[MediaInfo, "int | None"], int]
"""Tokens of a medium at a step (None at evaluation)."""

_MAX_REMEMBERED = 1 << 16


class PlannedSample(NamedTuple):
    """What a worker must know of a sample to build its part of a row."""

    source: int
    number: int
    text_length: int


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One row to build.

    Attributes:
        row: Number in the global sequence.
        step: Step to count media tokens for; None at evaluation.
        samples: What the row holds; empty for a row that only keeps ranks aligned.
        rejected: Samples that planning found unusable; building them tells why.
    """

    row: int
    step: int | None
    samples: tuple[PlannedSample, ...] = ()
    rejected: tuple[PlannedSample, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanState:
    """Where planning stands between two steps.

    Attributes:
        step: Next step.
        epoch: Epoch that the waiting samples belong to.
        positions: Next position of each data set.
        counts: Draws of each data set.
        waiting: Data set and position of each waiting sample, in the order of arrival.
    """

    step: int
    epoch: int
    positions: tuple[int, ...]
    counts: tuple[int, ...]
    waiting: tuple[tuple[int, int], ...] = ()

    @classmethod
    def start(cls, num_sources: int) -> PlanState:
        """The beginning of the stream."""
        return cls(0, 0, (0,) * num_sources, (0,) * num_sources)

    def num_used(self) -> list[int]:
        """Samples of each data set that the rows before ``step`` were planned with."""
        used = list(self.counts)
        for source, _ in self.waiting:
            used[source] -= 1
        return used


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All rows of one step, over all ranks, and where planning stood behind them.

    Attributes:
        step: Number of the step.
        rows: Its rows in order.
        epoch: As in ``PlanState``.
        positions: As in ``PlanState``.
        counts: As in ``PlanState``.
        waiting: The waiting samples.
    """

    step: int
    rows: tuple[RowPlan, ...]
    epoch: int
    positions: tuple[int, ...]
    counts: tuple[int, ...]
    waiting: tuple[Draw, ...]

    def state(self) -> PlanState:
        """The state to continue from at the next step."""
        waiting = tuple((draw.source, draw.position) for draw in self.waiting)
        return PlanState(self.step + 1, self.epoch, self.positions, self.counts, waiting)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRules:
    """What decides how samples become rows.

    Attributes:
        rows_per_step: Rows of one step over all ranks.
        row_length: Most tokens of a sample; None does not plan on lengths.
        truncate: Whether the text of longer samples is cut.
        count: Tokens of a medium.
        kinds: Kinds of media that can be used.
        max_rejected: Unusable samples after which a row is given out for them alone, so that the run can stop.
    """

    rows_per_step: int
    row_length: int | None
    truncate: bool
    count: CountTokens
    kinds: frozenset[str]
    max_rejected: int


class Planner:
    """Lays samples into rows, step by step.

    Args:
        cursors: The data sets.
        weights: Their weights for an endless mixture; None takes every sample of every (limited) cursor once, all
            data sets side by side in proportion to their sizes.
        pool: Chooses the samples of a row; empty.
        rules: How samples become rows.
        state: Where to continue.
    """

    def __init__(
        self,
        cursors: Sequence[Cursor],
        weights: Sequence[float] | None,
        pool: Pool,
        rules: PlanRules,
        state: PlanState,
    ) -> None:
        self._cursors = cursors
        self._endless = weights is not None
        self._pool = pool
        self._rules = rules
        self._epoch_size = sum(cursor.order.num_samples for cursor in cursors)
        self._mixture = Mixture(weights or [1.0] * len(cursors), state.counts)
        self._epoch = state.epoch
        self._step = state.step
        self._rejected: list[Draw] = []
        self._remembered: dict[int, tuple[tuple[MediaInfo, ...], int | None]] = {}
        self._restore(state)

    def steps(self) -> Iterator[StepPlan]:
        """Plan one step after another; ends only where every sample is to be used once."""
        while True:
            self._enter_step()
            rows = []
            for number in range(self._rules.rows_per_step):
                plan = self._plan_row(self._step * self._rules.rows_per_step + number)
                if number == 0 and not (plan.samples or plan.rejected):
                    return
                rows.append(plan)
            positions = tuple(cursor.position for cursor in self._cursors)
            counts, waiting = tuple(self._mixture.counts), tuple(self._pool.draws())
            yield StepPlan(self._step, tuple(rows), self._epoch, positions, counts, waiting)
            self._step += 1

    def _restore(self, state: PlanState) -> None:
        for cursor, position in zip(self._cursors, state.positions, strict=True):
            cursor.seek(position)
        for draw in self._draws_at(state.waiting):
            self._admit(draw)

    def _draws_at(self, places: Sequence[tuple[int, int]]) -> list[Draw]:
        found: dict[tuple[int, int], Draw] = {}
        for cursor in self._cursors:
            positions = [position for source, position in places if source == cursor.source]
            found |= {(draw.source, draw.position): draw for draw in cursor.draws_at(positions)}
        return [found[place] for place in places]

    def _enter_step(self) -> None:
        """Count all waiting samples for the step that is planned now."""
        if self._endless:
            self._remembered.clear()
            self._rejected += self._pool.remeasure(self._length_of)

    def _plan_row(self, row: int) -> RowPlan:
        self._fill_pool()
        limit = len(self._rejected) >= self._rules.max_rejected
        samples = () if limit else tuple(_planned(draw) for draw in self._pool.take())
        rejected = tuple(_planned(draw) for draw in self._rejected)
        self._rejected.clear()
        return RowPlan(row, self._step if self._endless else None, samples, rejected)

    def _fill_pool(self) -> None:
        pool, limit = self._pool, self._rules.max_rejected
        while not pool.ready() and len(self._rejected) < limit:
            if self._epoch_is_drawn():
                if not self._endless or pool.draws():
                    return
                self._epoch += 1
            self._admit(self._cursors[self._next_source()].take())

    def _admit(self, draw: Draw) -> None:
        """Let a sample wait for a row, or put it on the list of the unusable."""
        length = self._length_of(draw)
        if length is None:
            self._rejected.append(draw)
        else:
            self._pool.add(draw, length)

    def _epoch_is_drawn(self) -> bool:
        """Whether the samples that wait are the last of their epoch."""
        if not self._endless:
            return all(cursor.exhausted for cursor in self._cursors)
        drawn = 0
        for cursor in self._cursors:
            drawn += cursor.position
        return drawn >= self._epoch_size * (self._epoch + 1)

    def _next_source(self) -> int:
        if self._endless:
            return self._mixture.draw()
        progress = [cursor.position / cursor.order.num_samples for cursor in self._cursors]
        source = min(range(len(progress)), key=progress.__getitem__)
        self._mixture.counts[source] += 1
        return source

    def _length_of(self, draw: Draw) -> int | None:
        """Tokens of a sample at the step that is planned, None if it cannot be used."""
        limit = self._rules.row_length
        if limit is None:
            return 1
        if draw.text_length == UNREADABLE:
            return None
        media_tokens = self._media_tokens(draw.media)
        if media_tokens is None:
            return None
        length = media_tokens + draw.text_length
        if length <= limit:
            return length
        return limit if self._rules.truncate and media_tokens < limit else None

    def _media_tokens(self, media: tuple[MediaInfo, ...]) -> int | None:
        """Tokens of a sample's media at the step that is planned, None if the model cannot take them.

        Remembered by the identity of ``media``, which many samples share; hashing its content would cost more than
        counting.
        """
        if not media:
            return 0
        known = self._remembered.get(id(media))
        if known is not None:
            return known[1]
        if len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered.clear()
        tokens = self._count(media)
        self._remembered[id(media)] = (media, tokens)  # holding it keeps its identity its own
        return tokens

    def _count(self, media: tuple[MediaInfo, ...]) -> int | None:
        step = self._step if self._endless else None
        if all(info.kind in self._rules.kinds for info in media):
            with suppress(SampleError):
                return sum(self._rules.count(info, step) for info in media)
        return None


def _planned(draw: Draw) -> PlannedSample:
    return PlannedSample(draw.source, draw.number, draw.text_length)
