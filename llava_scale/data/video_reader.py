"""The packets of a video: how many frames there are, when each is shown, and decoding any of them.

Packets are read once and kept (the file lies in memory anyway), so nothing is sought twice and no header is believed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from llava_scale.data.containers import MediaLimits, decoded, packets_of, seconds, tagged_seconds
from llava_scale.errors import SampleError

_SEEK_FROM_S = 5.0  # clips that begin earlier are read from the start
_CUT_OFF_S = 0.5  # how much earlier than its header says a whole file may end


class VideoReader:
    """The frames of one open video, numbered in the order they are shown.

    Args:
        container: As ``containers.opened`` gives it; must stay open.
        limits: What the video may cost.
        start_s: Nothing before is needed; of a later clip only the packets around it are read.
        end_s: Nothing behind is needed; None reads to the end.

    Attributes:
        times_s: When each frame is shown, ascending.
        end_s: When the last frame ends.
        cut_off: What the header promises beyond the end of the file, in words; empty if nothing, or for a clip.
        num_errors: Packets that could not be decoded so far.

    Raises:
        SampleError: no video stream, no decoder for it, or over a limit.
    """

    def __init__(self, container: Any, limits: MediaLimits, start_s: float = 0.0, end_s: float | None = None) -> None:
        self.stream = stream_of(container, limits)
        self._limits = limits
        self.num_errors = 0
        self.cut_off = ""
        self._used = False
        self._packets = self._read(container, start_s, end_s)
        self._list_frames()
        if end_s is None:
            self.cut_off = self._missing(container, len(self._packets))

    def within(self, start_s: float, end_s: float | None) -> tuple[list[int], list[float], float]:
        """Numbers of the frames that are shown in a clip, when each begins in it, and when the last one ends.

        Raises:
            SampleError: there are none.
        """
        times = self.times_s
        until = self.end_s if end_s is None else min(end_s, self.end_s)
        inside = [i for i, time in enumerate(times) if start_s <= time < until]
        if start_s < until and times and times[0] < start_s and (not inside or times[inside[0]] > start_s):
            inside.insert(0, bisect_right(times, start_s) - 1)  # shown already when the clip begins
        if not inside:
            raise SampleError(f"the video has no frame between {start_s:g} s and {until:g} s")
        return inside, [max(times[i], start_s) for i in inside], until

    def decode(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """(number, frame) of the wanted frames (ascending numbers) that can be decoded without damage."""
        if not self._pts:
            yield from self._count(set(wanted))
            return
        for first, group in groupby(wanted, key=self._start_of):
            pts = {self._pts[number]: number for number in group}
            last = max(self._places[number] for number in pts.values())
            yield from self._run(self._packets[first : last + 1], pts)

    def decode_all(self) -> Iterator[tuple[int, Any]]:
        """(number, frame) of every frame that can be decoded, from the first packet to the last."""
        if not self._pts:
            yield from self._count(set(range(len(self.times_s))))
        else:
            yield from self._run(self._packets, {pts: number for number, pts in enumerate(self._pts)})

    def _read(self, container: Any, start_s: float, end_s: float | None) -> list[Any]:
        """All packets, or those from the last key frame before the clip to the first one behind it."""
        stream = self.stream
        base = float(stream.time_base)
        sought = self._sought = start_s > _SEEK_FROM_S
        if sought:
            container.seek(int(start_s / base), stream=stream)
        elif end_s is None:
            return list(packets_of(container, stream, self._limits))
        packets: list[Any] = []
        for packet in packets_of(container, stream, self._limits):
            if sought and not packets and not (packet.is_keyframe and packet.pts is not None):
                continue
            if packet.is_keyframe and end_s is not None and packet.pts is not None and packet.pts * base >= end_s:
                break
            packets.append(packet)
        if sought and (not packets or packets[0].pts * base > start_s):
            self._sought = False
            container.seek(stream.start_time or 0, stream=stream)
            return list(packets_of(container, stream, self._limits))
        return packets

    def _list_frames(self) -> None:
        """Number the frames in the order they are shown."""
        packets, base = self._packets, float(self.stream.time_base)
        shown = [(packet.pts, place) for place, packet in enumerate(packets) if not packet.is_discard]
        self._pts: list[int] = []
        self._places: list[int] = []
        if any(pts is None for pts, _ in shown):  # AVI: the decoder alone knows the order
            rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)
            self.times_s = [number / rate for number in range(len(shown))]
            self.end_s = len(shown) / rate
            return
        place_of = dict(reversed(shown))  # the first of equal stamps counts
        self._pts = sorted(place_of)
        self._places = [place_of[pts] for pts in self._pts]
        keys = [(packet.pts, place) for place, packet in enumerate(packets) if packet.is_keyframe]
        self._keys = sorted(key for key in keys if key[0] is not None)
        self.times_s = [pts * base for pts in self._pts]
        self.end_s = 0.0
        if self._pts:
            typical = (self._pts[-1] - self._pts[0]) / max(1, len(self._pts) - 1)
            self.end_s = (self._pts[-1] + (packets[self._places[-1]].duration or typical or 1)) * base

    def _missing(self, container: Any, num_packets: int) -> str:
        """What the header promises beyond what was found."""
        stream = self.stream
        if stream.frames > num_packets and not self._sought:
            return f"the header promises {stream.frames} frames and the file holds {num_packets}"
        end_s = seconds(stream.duration, stream.time_base)
        if end_s is not None:
            end_s += seconds(stream.start_time, stream.time_base) or 0.0
        else:
            end_s = tagged_seconds(stream)
        if end_s is None and len(container.streams) == 1 and container.duration:
            end_s = container.duration / 1_000_000
        if end_s is None or end_s - self.end_s <= _CUT_OFF_S:
            return ""
        return f"the header promises {end_s:.2f} s and the file ends at {self.end_s:.2f} s"

    def _start_of(self, number: int) -> int:
        """Place of the packet to decode from: the last key frame that is shown no later."""
        position = bisect_right(self._keys, (self._pts[number], len(self._packets)))
        return self._keys[position - 1][1] if position else 0

    def _run(self, packets: Sequence[Any], wanted: dict[int, int]) -> Iterator[tuple[int, Any]]:
        """Decode packets in their order and give out the frames whose stamps are wanted."""
        context = self._context()
        skipping = None
        for packet in packets:
            skip = packet.pts not in wanted
            if skip is not skipping:  # pictures that nothing refers to need not be decoded
                context.skip_frame = "NONREF" if skip else "DEFAULT"
                skipping = skip
            for frame in self._decoded(context, packet):
                if frame.pts in wanted and not frame.is_corrupt:
                    yield wanted[frame.pts], frame
        for frame in self._decoded(context, None):
            if frame.pts in wanted and not frame.is_corrupt:
                yield wanted[frame.pts], frame

    def _count(self, wanted: set[int]) -> Iterator[tuple[int, Any]]:
        """Decode from the start and number the frames as they come."""
        context, number = self._context(), 0
        last = max(wanted, default=-1)
        for packet in (*self._packets, None):
            for frame in self._decoded(context, packet):
                if number in wanted and not frame.is_corrupt:
                    yield number, frame
                number += 1
            if number > last:
                return

    def _context(self) -> Any:
        """The decoder, as new."""
        context = self.stream.codec_context
        if self._used:
            context.flush_buffers()
        else:
            context.thread_count = 1  # the workers of a loader are many already
            self._used = True
        context.skip_frame = "DEFAULT"
        return context

    def _decoded(self, context: Any, packet: Any) -> Any:
        frames, fine = decoded(context, packet)
        self.num_errors += not fine
        return frames


def stream_of(container: Any, limits: MediaLimits) -> Any:
    """The pictures of a file.

    Raises:
        SampleError: there are none, no decoder for them, or over a limit.
    """
    stream = container.streams.best("video")
    if stream is None:
        raise SampleError("video file without pictures")
    context = stream.codec_context
    if context is None:
        raise SampleError("no decoder for the pictures of this video")
    if context.width * context.height > limits.max_pixels:
        raise SampleError(
            f"video of {context.width} x {context.height} pixels exceeds the limit of {limits.max_pixels} a frame"
        )
    return stream
