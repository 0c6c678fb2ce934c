"""Byte ranges fetched before they are read, and neighbours joined into one request."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from llava_scale.errors import LlavaScaleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from llava_scale.data.store import Range

_MAX_GAP = 128 << 10
"""Bytes between two ranges that are cheaper to read along than a request of their own."""
_MAX_SPAN = 16 << 20


class Span(NamedTuple):
    """One request: bytes ``start`` to ``end``, and which of the asked ranges lie in it."""

    start: int
    end: int
    places: tuple[int, ...]


def join_ranges(ranges: Sequence[Range]) -> list[Span]:
    """Return few requests that cover all ranges (offset, size); none much longer than 16 MB, small gaps read along."""
    spans: list[Span] = []
    for place in sorted(range(len(ranges)), key=lambda place: ranges[place]):
        start, end = ranges[place][0], sum(ranges[place])
        last = spans[-1] if spans else None
        if last is not None and start - last.end <= _MAX_GAP and max(end, last.end) - last.start <= _MAX_SPAN:
            spans[-1] = Span(last.start, max(end, last.end), (*last.places, place))
        else:
            spans.append(Span(start, end, (place,)))
    return spans


class ReadAhead:
    """Bytes under way or waiting, at most ``limit_bytes``: the oldest are dropped, reading them asks again."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._spans: OrderedDict[tuple[str, int], _Pending] = OrderedDict()
        self._of_file: dict[str, set[int]] = {}
        self._num_bytes = 0

    def add(self, name: str, ranges: Sequence[Range], submit: Callable[[int, int], Future[bytes]]) -> None:
        """Request the ranges of a file that are not under way yet, through ``submit(offset, size)``."""
        new = [item for item in ranges if item[1] and not self.covers(name, *item)]
        for span in join_ranges(new):
            future = submit(span.start, span.end - span.start)
            with self._lock:
                self._drop((name, span.start))
                self._spans[name, span.start] = _Pending(span.end, len(span.places), future)
                self._of_file.setdefault(name, set()).add(span.start)
                self._num_bytes += span.end - span.start
                while self._num_bytes > self._limit_bytes and len(self._spans) > 1:
                    self._drop(next(iter(self._spans)))

    def covers(self, name: str, offset: int, size: int) -> bool:
        """Return whether the range is under way or waiting."""
        with self._lock:
            return self._find(name, offset, size) is not None

    def take(self, name: str, offset: int, size: int) -> bytes | None:
        """Return the range, waiting for it if it is under way; None if it was not asked for, or failed.

        Bytes are given up when as many ranges were taken from a request as it was made for.
        """
        with self._lock:
            start = self._find(name, offset, size)
            if start is None:
                return None
            pending = self._spans[name, start]
            pending.ranges -= 1
            if pending.ranges <= 0:
                self._drop((name, start))
        try:
            data = pending.future.result()
        except LlavaScaleError:
            return None
        return data[offset - start : offset - start + size]

    def clear(self) -> None:
        """Give up everything."""
        with self._lock:
            for key in list(self._spans):
                self._drop(key)

    def _find(self, name: str, offset: int, size: int) -> int | None:
        for start in self._of_file.get(name, ()):
            if start <= offset and offset + size <= self._spans[name, start].end:
                return start
        return None

    def _drop(self, key: tuple[str, int]) -> None:
        pending = self._spans.pop(key, None)
        if pending is None:
            return
        name, start = key
        self._num_bytes -= pending.end - start
        starts = self._of_file[name]
        starts.discard(start)
        if not starts:
            del self._of_file[name]


class _Pending:
    __slots__ = ("end", "future", "ranges")

    def __init__(self, end: int, ranges: int, future: Future[bytes]) -> None:
        self.end, self.ranges, self.future = end, ranges, future
