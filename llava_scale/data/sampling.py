"""Which frames of a video are used: pure functions of frame counts, rates and time stamps.

The index functions give what the official code of each model gives, except where that code fails or loses the end of a
video: a video below one frame a second counts every frame, and too many frames are spaced anew over the whole video
instead of being cut off.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from llava_scale.errors import ConfigError, SampleError, suggest

if TYPE_CHECKING:
    from llava_scale.types import MediaInfo

SamplingScheme = Literal[
    "time", "time_fps", "uniform", "fps", "videollama2", "videollama2_fps", "llava_next", "transformers",
    "transformers_fps",
]  # fmt: skip

_CLOCK_S = 0.0006

MAX_FRAMES = 32
"""Most frames of a video in the original, in VideoLLaMA2 and by default here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSampling:
    """How frames are chosen.

    Attributes:
        scheme: ``time`` takes the frames shown in the middles of equal spans of time, ``time_fps`` as many spans as
            ``fps`` asks for; both are right for variable frame rates, late starts and missing frames. The others take
            the indices that official code takes: ``uniform`` and ``fps`` of the original, ``videollama2`` and
            ``videollama2_fps``, ``llava_next`` (by ``fps``), ``transformers`` and ``transformers_fps``.
        num_frames: Frames of a video; schemes that go by ``fps`` do not use it.
        fps: Frames a second; only for schemes that go by it.
        max_frames: Most frames of a video; more are spaced anew over the whole video.
    """

    scheme: SamplingScheme = "time"
    num_frames: int = 8
    fps: float = 1.0
    max_frames: int = MAX_FRAMES

    def __post_init__(self) -> None:
        if self.scheme not in get_args(SamplingScheme):
            known = get_args(SamplingScheme)
            raise ConfigError(f"unknown sampling scheme {self.scheme!r}; {suggest(str(self.scheme), known)}")
        if self.num_frames < 1 or self.max_frames < 1 or not 0 < self.fps < math.inf:
            raise ConfigError(f"num_frames, max_frames and fps must be positive, got {self}")

    def num_sampled(self, *, num_frames: int, duration_s: float) -> int:
        """Frames that will be used of a video with ``num_frames`` frames in ``duration_s`` seconds.

        Raises:
            SampleError: the number or duration is needed and unknown (0), or the scheme refuses such a video.
        """
        if self.scheme == "time":
            return min(self.num_frames, self.max_frames)
        if self.scheme == "time_fps":
            return self._num_spans(duration_s)
        return len(self._by_index(num_frames, _rate(num_frames, duration_s)))

    def indices(self, times_s: Sequence[float], end_s: float, planned: MediaInfo | None = None) -> list[int]:
        """Positions in ``times_s`` of the frames to use, ascending; a frame shown for long may come several times.

        Args:
            times_s: When each frame is shown, ascending.
            end_s: When the last frame ends.
            planned: What ``num_sampled`` was told, if it was; then as many frames are chosen as it said.

        Raises:
            SampleError: no frames, the scheme refuses such a video, or a scheme that goes by index finds another
                number of frames than planned.
        """
        if not times_s:
            raise SampleError("the video has no frames")
        num_frames, duration_s = len(times_s), end_s - times_s[0]
        if planned is not None and (planned.num_frames == num_frames or self.scheme == "time_fps"):
            duration_s = planned.duration_s
        number = self.num_sampled(num_frames=num_frames, duration_s=duration_s)
        if self.scheme in ("time", "time_fps"):
            return shown_at(middles(times_s[0], end_s, number), times_s)
        chosen = self._by_index(num_frames, _rate(num_frames, duration_s))
        if planned is not None:
            promised = self.num_sampled(num_frames=planned.num_frames, duration_s=planned.duration_s)
            if len(chosen) != promised:
                raise SampleError(
                    f"sampling {self.scheme!r} gives {len(chosen)} of {num_frames} frames where {promised} of "
                    f"{planned.num_frames} were planned: the file differs from its header; sample by time"
                )
        return chosen

    def _num_spans(self, duration_s: float) -> int:
        if duration_s <= 0:
            raise SampleError("the duration of the video is unknown; index the shard again")
        return min(max(1, round(duration_s * self.fps)), self.max_frames)

    def _by_index(self, num_frames: int, rate_hz: float) -> list[int]:
        chosen = _SCHEMES[self.scheme](num_frames, rate_hz, self)
        if len(chosen) <= self.max_frames:
            return chosen
        return spread_indices(num_frames, self.max_frames)


def middles(start_s: float, end_s: float, number: int) -> list[float]:
    """Middles of ``number`` equal spans from ``start_s`` to ``end_s``."""
    span = (end_s - start_s) / number
    return [start_s + (i + 0.5) * span for i in range(number)]


def shown_at(instants_s: Sequence[float], times_s: Sequence[float]) -> list[int]:
    """Positions of the frames that are shown at each instant: the last one that began; the first before any began."""
    return [max(0, bisect_right(times_s, instant) - 1) for instant in instants_s]


def spread_indices(num_frames: int, number: int) -> list[int]:
    """``number`` indices from the first to the last frame, equally spaced and rounded down."""
    return [int(i) for i in np.linspace(0, num_frames - 1, number, dtype=int)]


def uniform_indices(num_frames: int, number: int) -> list[int]:
    """The original's: middle of each of ``number`` segments, both rounded to whole frames."""
    segment = (num_frames - 1) / number
    edges = [round(segment * i) for i in range(number + 1)]
    return [(start + end) // 2 for start, end in pairwise(edges)]


def segment_indices(num_frames: int, rate_hz: float, fps: float) -> list[int]:
    """The original's and VideoLLaMA2's by rate: middle of each ``1 / fps`` seconds; every frame of a slower video."""
    segment = max(1.0, min(rate_hz // fps, num_frames))
    return [int(i) for i in np.arange(segment // 2, num_frames, segment, dtype=int)]


def videollama2_indices(num_frames: int, number: int) -> list[int]:
    """VideoLLaMA2's: middle of each of ``number`` segments, rounded once, halves up."""
    segment = (num_frames - 1) / number
    middle = [(segment * i + segment * (i + 1)) / 2 for i in range(number)]
    return [round(position + 1e-6) for position in middle]


def videollama2_range(num_frames: int, rate_hz: float, start_s: float, end_s: float) -> range:
    """Frames VideoLLaMA2 takes for a clip: negative times are 0, swapped ones are put right, empty ones last 1 s."""
    start_s, end_s = sorted((max(0.0, start_s), max(0.0, end_s)))
    if start_s == end_s:
        end_s = start_s + 1
    return range(max(int(start_s * rate_hz) - 1, 0), min(int(end_s * rate_hz) - 1, num_frames - 1) + 1)


def llava_next_indices(num_frames: int, rate_hz: float, fps: float, *, upper: int, always: bool = False) -> list[int]:
    """LLaVA-NeXT's: every ``rate / fps``-th frame; ``upper`` of them over the whole video if more, or ``always``."""
    chosen = list(range(0, num_frames, max(1, round(rate_hz / fps))))
    if upper and (len(chosen) > upper or always):
        return spread_indices(num_frames, upper)
    return chosen


def transformers_indices(num_frames: int, number: int) -> list[int]:
    """transformers': beginning of each of ``number`` segments.

    Raises:
        SampleError: more frames wanted than there are.
    """
    if number > num_frames:
        raise SampleError(f"the video has {num_frames} frames, fewer than the {number} that sampling asks for")
    return [i * num_frames // number for i in range(number)]


def _rate(num_frames: int, duration_s: float) -> float:
    if num_frames < 1 or duration_s <= 0:
        raise SampleError("the number of frames or the duration of the video is unknown; index the shard again")
    rate = num_frames / duration_s
    whole = round(rate)
    # Indexes know durations to a millisecond, and rates are divided without remainder: 24 must not become 23.999.
    if whole and abs(duration_s - num_frames / whole) <= _CLOCK_S:
        return float(whole)
    return round(rate, 6)


_SCHEMES: dict[str, Callable[[int, float, FrameSampling], list[int]]] = {
    "uniform": lambda n, rate, how: uniform_indices(n, how.num_frames),
    "fps": lambda n, rate, how: segment_indices(n, rate, how.fps),
    "videollama2": lambda n, rate, how: videollama2_indices(n, how.num_frames),
    "videollama2_fps": lambda n, rate, how: segment_indices(n, rate, how.fps),
    "llava_next": lambda n, rate, how: llava_next_indices(n, rate, how.fps, upper=how.max_frames),
    "transformers": lambda n, rate, how: transformers_indices(n, how.num_frames),
    "transformers_fps": lambda n, rate, how: transformers_indices(n, max(1, int(n / rate * how.fps))),
}
