"""Encoded videos to frames: chosen by time or index, decoded from the nearest key frame, fitted as they are read.

Legend: ``F`` frames, ``H``/``W`` pixels, ``S`` side of the model's square picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava_scale.data.containers import MediaLimits, PartialPolicy, opened
from llava_scale.data.media import ImageTransform
from llava_scale.data.records import split_frames
from llava_scale.data.sampling import FrameSampling
from llava_scale.data.video_index import IndexedReader, IndexMismatchError
from llava_scale.data.video_reader import VideoReader
from llava_scale.errors import SampleError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from llava_scale.types import MediaInfo


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """Decoded frames of one video.

    Attributes:
        data: uint8 ``(F, 3, S, S)``, channels-last in memory.
        times_s: When each is shown, in the time of the file.
        num_damaged: Frames that could not be decoded; the nearest readable one stands in for each.
    """

    data: Tensor
    times_s: tuple[float, ...]
    num_damaged: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoTransform:
    """Encoded video -> frames for the model; picklable.

    Attributes:
        image: How each frame is fitted.
        sampling: Which frames.
        partial: ``forbid`` refuses damaged files, ``allow`` uses what can be decoded of them.
        limits: What a video may cost.
    """

    image: ImageTransform
    sampling: FrameSampling = field(default_factory=FrameSampling)
    partial: PartialPolicy = "forbid"
    limits: MediaLimits = field(default_factory=MediaLimits)

    def num_frames(self, info: MediaInfo) -> int:
        """Frames that will be made of a video with this header.

        Raises:
            SampleError: if that cannot be known.
        """
        return self.sampling.num_sampled(num_frames=info.num_frames, duration_s=info.duration_s)

    def __call__(
        self, data: bytes, *, planned: MediaInfo | None = None, start_s: float = 0.0, end_s: float | None = None
    ) -> VideoFrames:
        """Decode the chosen frames.

        Args:
            data: The whole file.
            planned: What ``num_frames`` was told of the file, or of the clip; then as many frames come as it said. If
                it names a clip, that is taken.
            start_s: Where the clip begins, in the time of the file.
            end_s: Where it ends; None is the end of the file.

        Raises:
            SampleError: unreadable, over a limit, damaged and not allowed to be, no frame in the clip, or not
                as planned.
        """
        if planned is not None and planned.clip is not None:
            start_s, end_s = planned.clip
        if end_s is not None and end_s <= start_s:
            raise SampleError(f"the clip ends at {end_s} s, not after its start at {start_s} s")
        with opened(data, "video") as container:
            indexed = IndexedReader.of(container, self.limits) if not start_s and end_s is None else None
            if indexed is None:
                return self._sampled(VideoReader(container, self.limits, start_s, end_s), planned, start_s, end_s)
            with suppress(IndexMismatchError):
                return self._sampled(indexed, planned, start_s, end_s)
        with opened(data, "video") as container:
            return self._sampled(VideoReader(container, self.limits), planned, start_s, end_s)

    def stored(self, data: bytes, times_s: Sequence[float] = (), *, planned: MediaInfo | None = None) -> VideoFrames:
        """Frames of a video that was stored as pictures (``records.join_frames``).

        Args:
            data: The joined pictures.
            times_s: When each is shown; without, they count as equally spaced.
            planned: As for a file. If as many frames are planned as there are pictures, all are used.

        Raises:
            SampleError: an unreadable picture, or not as planned.
        """
        pictures = split_frames(data)
        times = list(times_s) if len(times_s) == len(pictures) else [float(i) for i in range(len(pictures))]
        chosen = list(range(len(pictures)))
        if planned is not None and self.num_frames(planned) != len(pictures):
            step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
            chosen = self.sampling.indices(times, times[-1] + step, planned)
        block = self._block(len(chosen))
        for place, number in enumerate(chosen):
            self.image(pictures[number][1], out=block[place])
        return VideoFrames(block, tuple(times[number] for number in chosen))

    def _sampled(
        self, reader: VideoReader, planned: MediaInfo | None, start_s: float, end_s: float | None
    ) -> VideoFrames:
        if reader.cut_off and self.partial == "forbid":
            raise SampleError(f"{reader.cut_off}: it is cut off (data.partial: allow would use the rest)")
        return self._frames(reader, self._choose(reader, planned, start_s, end_s))

    def _choose(self, reader: VideoReader, planned: MediaInfo | None, start_s: float, end_s: float | None) -> list[int]:
        """Numbers of the frames to decode."""
        inside, begins, until = reader.within(start_s, end_s)
        if until - begins[0] > self.limits.max_seconds:
            raise SampleError(
                f"video of {until - begins[0]:.0f} s exceeds the limit of {self.limits.max_seconds:g} s; "
                "take a clip, or raise data.max_media_seconds"
            )
        return [inside[i] for i in self.sampling.indices(begins, until, planned)]

    def _frames(self, reader: VideoReader, chosen: list[int]) -> VideoFrames:
        """Decode and fit; frames that are chosen several times are decoded once."""
        block = self._block(len(chosen))
        first_place = {number: place for place, number in reversed(list(enumerate(chosen)))}
        fitter = _Fitter(self.image, self.limits)
        shown: dict[int, int] = {}
        for number, frame in reader.decode(sorted(first_place)):
            if number not in shown:
                fitter.fit(frame, block[first_place[number]])
                shown[number] = number
        missing = [number for number in first_place if number not in shown]
        if missing or reader.num_errors:
            self._check_damage(reader, missing)
        if missing:
            shown |= _fill(reader, missing, fitter, {number: block[first_place[number]] for number in missing})
        for place, number in enumerate(chosen):
            if place != first_place[number]:
                block[place] = block[first_place[number]]
        num_damaged = sum(shown[number] != number for number in chosen)
        return VideoFrames(block, tuple(reader.times_s[shown[number]] for number in chosen), num_damaged)

    def _check_damage(self, reader: VideoReader, missing: list[int]) -> None:
        if self.partial == "allow":
            return
        where = ""
        if missing:
            where = f", {len(missing)} of the wanted frames among them, first at {reader.times_s[min(missing)]:.2f} s"
        raise SampleError(
            f"damaged video: {reader.num_errors} packets cannot be decoded{where} "
            "(data.partial: allow would use the rest)"
        )

    def _block(self, number: int) -> Tensor:
        side = self.image.size
        return torch.empty(number, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)


class _Fitter:
    """Fits decoded frames with one converter, which keeps its tables between frames."""

    def __init__(self, image: ImageTransform, limits: MediaLimits) -> None:
        from av.video.reformatter import VideoReformatter

        self._image, self._limits = image, limits
        self._reformatter: Any = VideoReformatter()

    def fit(self, frame: Any, out: Tensor) -> None:
        """Convert to RGB (large frames reduced at the same time), turn upright, fit into ``out``."""
        width, height = frame.width, frame.height
        if width * height > self._limits.max_pixels:
            raise SampleError(f"frame of {width} x {height} pixels exceeds the limit of {self._limits.max_pixels}")
        factor = self._image.reduction(width, height)
        size = {"width": width // factor, "height": height // factor} if factor > 1 else {}
        method = "AREA" if factor > 1 else "BILINEAR"
        pixels = _pixels(self._reformatter.reformat(frame, format="rgb24", interpolation=method, threads=1, **size))
        quarters = round(getattr(frame, "rotation", 0) / 90) % 4
        if quarters:
            pixels = np.ascontiguousarray(np.rot90(pixels, quarters))
        square = out.permute(1, 2, 0).numpy()
        if pixels.shape == square.shape:
            square[...] = pixels
        else:
            self._image.from_tensor(torch.from_numpy(pixels).permute(2, 0, 1), out=out)


def _pixels(frame: Any) -> NDArray[np.uint8]:
    """``(H, W, 3)`` of an RGB frame, in its own memory."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8, plane.line_size * frame.height).reshape(frame.height, plane.line_size)
    return rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def _fill(reader: VideoReader, missing: list[int], fitter: _Fitter, places: dict[int, Tensor]) -> dict[int, int]:
    """Put the nearest readable frame in each missing one's place; returns which one that is."""
    readable = sorted({number for number, _ in reader.decode_all()})
    if not readable:
        raise SampleError("no frame of the video can be decoded")
    times = reader.times_s
    nearest = {number: min(readable, key=lambda other: abs(times[other] - times[number])) for number in missing}
    for number, frame in reader.decode_all():
        for lost, stand_in in nearest.items():
            if stand_in == number:
                fitter.fit(frame, places[lost])
    return nearest
