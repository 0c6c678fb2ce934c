"""Long videos whose file lists its packets: wanted frames are reached without reading the packets between them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from llava_scale.data.containers import MediaLimits, leave_out_others
from llava_scale.data.video_reader import VideoReader, stream_of

_PAYS_FROM = 2  # packets; fewer are read as fast as their index
_KEY_FRAME = 1  # FFmpeg's AVINDEX_KEYFRAME


class IndexMismatchError(Exception):
    """The packets are not as the index lists them; read all of them instead."""


class IndexedReader(VideoReader):
    """A :class:`VideoReader` of a whole file that reads only the packets from a key frame to the wanted frames.

    The packets that are read must lie where the index puts them. ``decode`` and ``decode_all`` raise
    ``IndexMismatchError`` where one does not.
    """

    def __init__(
        self, container: Any, stream: Any, limits: MediaLimits, stamps: Sequence[int], keys: Sequence[int]
    ) -> None:
        self.stream = stream
        self._container, self._limits = container, limits
        self._stamps, self._keys_at = stamps, keys
        self._first, self._step = stream.start_time, stamps[1] - stamps[0]
        self._used = self._sought = False
        self.num_errors = 0
        base = float(stream.time_base)
        number = len(stamps)
        self.times_s = [(self._first + place * self._step) * base for place in range(number)]
        self.end_s = (self._first + number * self._step) * base
        self.cut_off = self._missing(container, number)
        leave_out_others(container, stream)

    @classmethod
    def of(cls, container: Any, limits: MediaLimits) -> IndexedReader | None:
        """A reader by the index; None where there is none, it does not tell when each frame is shown, or is short."""
        stream = stream_of(container, limits)
        number = stream.frames
        if not _PAYS_FROM <= number <= limits.max_packets or not container.format.name.startswith("mov"):
            return None
        listed = getattr(stream, "index_entries", ())  # older versions of PyAV do not show them
        if len(listed) != number or stream.start_time is None:
            return None
        entries = [(entry.timestamp, entry.flags, entry.pos + entry.size) for entry in listed]
        stamps, flags, ends = zip(*entries, strict=True)
        step = stamps[1] - stamps[0]
        is_even = step > 0 and stamps == tuple(range(stamps[0], stamps[0] + number * step, step))
        if not is_even or not {*flags} <= {0, _KEY_FRAME} or flags[0] != _KEY_FRAME or max(ends) > container.size:
            return None
        keys = [place for place, flag in enumerate(flags) if flag == _KEY_FRAME]
        return cls(container, stream, limits, stamps, keys)

    def decode(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """(number, frame) of the wanted frames (ascending numbers) that can be decoded without damage."""
        for start, group in groupby(wanted, key=lambda number: bisect_right(self._keys_at, number) - 1):
            stamps = {self._first + number * self._step: number for number in group}
            yield from self._run(self._packets_of(start, {*stamps}), stamps)

    def decode_all(self) -> Iterator[tuple[int, Any]]:
        """(number, frame) of every frame that can be decoded."""
        yield from self.decode(range(len(self.times_s)))

    def _packets_of(self, key: int, wanted: set[int]) -> list[Any]:
        """The packets of a group of pictures up to the last one that is wanted."""
        import av

        start, end = (*self._keys_at, len(self._stamps))[key : key + 2]
        first = self._first + start * self._step
        left = {*range(first, self._first + end * self._step, self._step)}
        packets: list[Any] = []
        try:
            self._container.seek(first, stream=self.stream)
            for packet in islice(self._container.demux(self.stream), end - start):
                is_key = packet.is_keyframe and packet.dts == self._stamps[start] and packet.pts == first
                if packet.pts not in left or not (packets or is_key):
                    break
                packets.append(packet)
                left.discard(packet.pts)
                wanted.discard(packet.pts)
                if not wanted:
                    return packets
        except av.FFmpegError:
            pass
        raise IndexMismatchError
