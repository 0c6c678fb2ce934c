"""Encoded sound, alone or of a video, to one channel of float32 at the model's rate.

The channels are averaged (FFmpeg's own downmix is 3 dB louder), then resampled with an anti-aliasing filter. Samples
are counted rather than placed by their time stamps, which jump in some containers without a real gap; stamps decide
only where a clip or a track begins and after damage.

Legend: ``N`` samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from llava_scale.data.containers import (
    MediaLimits,
    PartialPolicy,
    decoded,
    is_cover,
    opened,
    packets_of,
    seconds,
    sound_end_s,
)
from llava_scale.errors import ConfigError, SampleError

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE_S = 0.15
"""Sound that may be missing before a file counts as damaged: codecs' delays, tags between frames."""

_SEEK_FROM_S = 2.0  # clips that begin earlier are read from the start
_LEAD_S = 0.5  # decoded before a clip, so that the decoder has settled
_SETTLE_S = 0.05  # kept before a clip for the resampling filter
_PADDING_S = 0.2  # silence that codecs append
_LONGEST_GAP_S = 60.0  # behind damage; beyond it the time stamp itself is damaged
_BLOCK_S = 4.0
_LOUDEST = 4.0  # lossy codecs exceed 1 a little; far beyond it is damage

_SAMPLES: dict[str, tuple[str, int]] = {
    "u8": ("u1", 1 << 7),
    "s16": ("<i2", 1 << 15),
    "s32": ("<i4", 1 << 31),
    "s64": ("<i8", 1 << 63),
    "flt": ("<f4", 1),
    "dbl": ("<f8", 1),
}
"""FFmpeg's sample formats: type and what counts as 1."""


@dataclass(frozen=True, slots=True)
class AudioWave:
    """Decoded sound.

    Attributes:
        data: float32 ``(N,)`` in [-1, 1].
        lost_s: Seconds that could not be decoded and are silence.
    """

    data: Tensor
    lost_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioTransform:
    """Encoded sound -> one channel at ``sample_rate``; picklable.

    Attributes:
        sample_rate: Samples a second of the result.
        partial: ``forbid`` refuses damaged files, ``allow`` puts silence where nothing can be decoded.
        limits: What a sound may cost.
    """

    sample_rate: int = 16_000
    partial: PartialPolicy = "forbid"
    limits: MediaLimits = field(default_factory=MediaLimits)

    def __post_init__(self) -> None:
        if self.sample_rate < 1:
            raise ConfigError(f"sample_rate must be positive, got {self.sample_rate}")

    def __call__(
        self, data: bytes, *, num_samples: int = 0, start_s: float = 0.0, end_s: float | None = None
    ) -> AudioWave:
        """Decode the sound of a file; of a video its own sound track, on the video's clock.

        Args:
            data: The whole file.
            num_samples: What was planned on: the result is cut or filled up with silence to it. 0 takes what there is.
            start_s: Where the clip begins.
            end_s: Where it ends; None is the end of the file.

        Raises:
            SampleError: unreadable, without sound, over a limit, or damaged and not allowed to be.
        """
        if end_s is not None and end_s <= start_s:
            raise SampleError(f"the clip ends at {end_s} s, not after its start at {start_s} s")
        with opened(data, "sound") as container:
            track = _Track(container, data, self.limits)
            mixer = _Mixer(track, self, start_s)
            for position, frame in track.frames(max(0.0, start_s - _SETTLE_S)):
                if end_s is not None and position >= (end_s + _SETTLE_S) * track.rate:
                    break
                if position + frame.samples > (start_s - _SETTLE_S) * track.rate:
                    mixer.add(position, frame)
            wave = mixer.clip(end_s)
        lost_s = mixer.lost_s
        if end_s is None and track.expected_s is not None:
            lost_s += max(0.0, track.expected_s - max(mixer.end_s, start_s))
        if not len(wave):
            raise SampleError("the sound has no samples" + (" that can be decoded" if track.num_errors else ""))
        if self.partial == "forbid" and lost_s > TOLERANCE_S:
            raise SampleError(
                f"damaged sound: {lost_s:.2f} s of {track.expected_s or mixer.end_s:.2f} s cannot be decoded "
                "(data.partial: allow would use the rest)"
            )
        return AudioWave(_fitted(torch.from_numpy(wave), num_samples).clamp_(-1, 1), lost_s)


class _Track:
    """The frames of a sound track and where they begin, in samples of the file.

    Attributes:
        rate: Samples a second in the file.
        expected_s: End of the track by its header, None where that is a guess.
        num_errors: Packets that could not be decoded so far.
    """

    def __init__(self, container: Any, data: bytes, limits: MediaLimits) -> None:
        stream = container.streams.best("audio")
        if stream is None:
            raise SampleError("the file has no sound track")
        if stream.codec_context is None or not stream.codec_context.sample_rate:
            raise SampleError("no decoder for this sound, or no sample rate in its header")
        stream.codec_context.thread_count = 1  # the workers of a loader are many already
        self._container, self._stream, self._limits = container, stream, limits
        self.rate = int(stream.codec_context.sample_rate)
        # Beside pictures time counts from 0; a sound alone begins with its first sample.
        beside_pictures = any(not is_cover(other) for other in container.streams.video)
        self._origin_s = 0.0 if beside_pictures else seconds(stream.start_time, stream.time_base) or 0.0
        self.expected_s = sound_end_s(container, stream, data, self._origin_s)
        self.num_errors = 0

    def frames(self, start_s: float) -> Iterator[tuple[int, Any]]:
        """(position, frame) from ``start_s`` or earlier to the end."""
        if start_s > _SEEK_FROM_S:
            self._seek(start_s - _LEAD_S + self._origin_s)
            frames = self._decoded()
            first = next(frames, None)
            if first is not None and first[0] <= start_s * self.rate:
                yield first
                yield from frames
                return
            self._stream.codec_context.flush_buffers()
            self._seek(0.0)
        yield from self._decoded()

    def _seek(self, time_s: float) -> None:
        self._container.seek(int(time_s / float(self._stream.time_base)), stream=self._stream)

    def _decoded(self) -> Iterator[tuple[int, Any]]:
        context = self._stream.codec_context
        position: int | None = None  # None asks the next time stamp
        end = 0
        for packet in chain(packets_of(self._container, self._stream, self._limits), (None,)):
            frames, fine = decoded(context, packet)
            if not fine:
                self.num_errors += 1
                position = None
            for frame in frames:
                if frame.sample_rate != self.rate:
                    raise SampleError(f"sound that changes from {self.rate} to {frame.sample_rate} samples a second")
                position = self._stamp(frame, end) if position is None else position
                yield position, frame
                position = end = position + frame.samples

    def _stamp(self, frame: Any, end: int) -> int:
        """Where a frame begins by its time stamp; ``end``, where the last one did end, if that cannot be."""
        at_s = seconds(frame.pts, frame.time_base)
        if at_s is None or (self.expected_s is not None and at_s - self._origin_s > self.expected_s):
            return end
        stamp = round((at_s - self._origin_s) * self.rate)
        return stamp if end == 0 or 0 <= stamp - end <= _LONGEST_GAP_S * self.rate else end


class _Mixer:
    """Frames in, one channel at the wanted rate out."""

    def __init__(self, track: _Track, how: AudioTransform, start_s: float) -> None:
        import av

        self._track, self._how, self._start_s = track, how, start_s
        self._resampler: Any = av.AudioResampler(format="fltp", layout="mono", rate=how.sample_rate)
        self.lost_s = 0.0
        # Output begins at a sample that the input has too, so that a clip's samples are those of the whole sound.
        self._grid = track.rate // gcd(track.rate, how.sample_rate)
        self._drop = 0  # samples of the first frame before that one
        self._first: int | None = None
        self._end = 0
        self._waiting: list[list[NDArray[Any]]] = []  # their channels, or all interleaved, in their own memory
        self._block = _BLOCK_S * track.rate
        self._num_waiting = 0
        self._look: tuple[str, int] = ("", 0)  # sample format and channels of the waiting frames
        self._dtype, self._interleaved = "", 0
        self._pieces: list[NDArray[np.float32]] = []

    @property
    def end_s(self) -> float:
        """End of what was added."""
        return self._end / self._track.rate

    def add(self, position: int, frame: Any) -> None:
        """Add the next frame; what lies between it and the last one is silence, and counts as lost."""
        if self._first is None:
            self._drop = -position % self._grid
            if self._drop >= frame.samples:
                return
            self._first, self._end = position + self._drop, position
        self._check_length(position)
        if position > self._end:
            self._flush()
            self.lost_s += (position - self._end) / self._track.rate
            self._resample(np.zeros(position - self._end, np.float32))
        look = (frame.format.name, frame.layout.nb_channels)
        if look != self._look or self._num_waiting >= self._block:
            self._flush()
            self._look = look
            self._dtype, _ = _SAMPLES[look[0].removesuffix("p")]
            self._interleaved = 1 if look[0].endswith("p") else look[1]
        samples = frame.samples
        number = samples * self._interleaved
        self._waiting.append([np.frombuffer(plane, self._dtype, number) for plane in frame.planes])
        self._num_waiting += samples
        self._end = position + samples

    def clip(self, end_s: float | None) -> NDArray[np.float32]:
        """What was added, from the start of the clip to ``end_s`` or the end; silence before the track begins."""
        self._flush()
        self._collect(self._resampler.resample(None))
        wave = np.concatenate([np.zeros(0, np.float32), *self._pieces])
        if self._first is None:
            return wave
        rate = self._how.sample_rate
        until = self.end_s if end_s is None else min(self.end_s, end_s)
        expected_s = self._track.expected_s
        if expected_s is not None and 0 < until - expected_s < _PADDING_S:
            until = expected_s
        begin = round((self._start_s - self._first / self._track.rate) * rate)
        wave = wave[begin:] if begin > 0 else np.concatenate([np.zeros(-begin, np.float32), wave])
        return wave[: max(0, round((until - self._start_s) * rate))]

    def _check_length(self, position: int) -> None:
        limit_s = self._how.limits.max_seconds
        if position / self._track.rate - self._start_s > limit_s:
            raise SampleError(
                f"sound of more than {limit_s:g} s, the limit; take a clip, or raise data.max_media_seconds"
            )

    def _flush(self) -> None:
        """Mix the waiting frames down and resample them."""
        if not self._waiting:
            return
        mono = _mono(self._waiting, *self._look)[self._drop :]
        self._drop = 0
        self._waiting.clear()
        self._num_waiting = 0
        if len(mono) and not max(mono.max(), -mono.min()) <= _LOUDEST:  # also where some are no number
            bad = ~(np.abs(mono) <= _LOUDEST)
            self.lost_s += float(bad.sum()) / self._track.rate
            mono = np.where(bad, np.float32(0), mono)
        self._resample(mono)

    def _resample(self, mono: NDArray[np.float32]) -> None:
        import av

        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(mono)[None], format="fltp", layout="mono")
        frame.sample_rate = self._track.rate
        self._collect(self._resampler.resample(frame))

    def _collect(self, frames: Any) -> None:
        self._pieces += [frame.to_ndarray()[0] for frame in frames]


def _mono(frames: list[list[NDArray[Any]]], name: str, num_channels: int) -> NDArray[np.float32]:
    """Mean of the channels of consecutive frames, in [-1, 1]."""
    planes = [np.concatenate(plane) for plane in zip(*frames, strict=True)]
    if len(planes) != num_channels:
        planes = list(planes[0].reshape(-1, num_channels).T)
    mono: NDArray[np.float32] = planes[0].astype(np.float32, copy=False)
    for plane in planes[1:]:
        mono += plane
    _, scale = _SAMPLES[name.removesuffix("p")]
    if scale * num_channels != 1:
        mono *= np.float32(1 / (scale * num_channels))
    return mono - np.float32(1) if name.startswith("u8") else mono


def _fitted(wave: Tensor, num_samples: int) -> Tensor:
    if not num_samples or len(wave) == num_samples:
        return wave
    if len(wave) > num_samples:
        return wave[:num_samples]
    return torch.nn.functional.pad(wave, (0, num_samples - len(wave)))
