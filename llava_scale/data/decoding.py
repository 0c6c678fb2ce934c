"""Videos and sounds of one sample, decoded for the model.

Transforms are given to the loader by the model, which alone knows what its towers take:

- video: ``transform(data, planned=info)`` for an encoded file, ``transform.stored(pictures, times_s, planned=info)``
  for frames stored ahead of time; both return an object whose ``data`` is uint8 ``(F, 3, H, W)``.
- sound: ``transform(data, planned=info)`` returns ``AudioFeatures``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llava_scale.data.records import FRAME_TIMES, FRAMES_EXT
from llava_scale.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

    from llava_scale.data.features import Rows
    from llava_scale.types import AudioFeatures, MediaInfo, MediaKind, Sample


@dataclass(frozen=True, slots=True)
class OtherMedia:
    """What a sample has beside decoded pictures.

    Attributes:
        frames: uint8 ``(F, 3, H, W)`` of each video.
        sounds: Input of the audio tower, of each sound.
        stored: Per kind the tower features of each medium, where they were computed ahead.
    """

    frames: list[Tensor] = field(default_factory=list)
    sounds: list[AudioFeatures] = field(default_factory=list)
    stored: Mapping[MediaKind, list[Rows]] = field(default_factory=dict)


def decode_others(
    sample: Sample,
    infos: Sequence[MediaInfo],
    transforms: Mapping[MediaKind, Callable[..., Any]],
    leave: Container[MediaKind] = (),
) -> OtherMedia:
    """Decode the videos and sounds of ``sample``, whose index entry says ``infos``, but for the kinds in ``leave``.

    Raises:
        SampleError: one cannot be decoded as planned; it is named where a sample has several.
    """
    planned = {kind: [info for info in infos if info.kind == kind] for kind in ("video", "audio")}
    videos, sounds = [], []
    if "video" not in leave:
        videos = [
            _decode_video(sample, number, transforms["video"], info) for number, info in enumerate(planned["video"])
        ]
    if "audio" not in leave:
        sounds = [
            transforms["audio"](data, planned=info)
            for (_, data), info in zip(sample.media.get("audio", ()), planned["audio"], strict=True)
        ]
    return OtherMedia(videos, sounds)


def joined_frames(videos: Sequence[Tensor]) -> Tensor | None:
    """Frames of all videos, ``(F, 3, H, W)``; None without any.

    Raises:
        ShapeError: they differ in size.
    """
    if not videos:
        return None
    shapes = [tuple(video.shape[1:]) for video in videos]
    if len(set(shapes)) > 1:
        raise ShapeError(different_shapes("videos", shapes))
    return torch.cat(list(videos))


def different_shapes(name: str, shapes: Sequence[tuple[int, ...]]) -> str:
    """What is wrong with media of these shapes in one row."""
    return f"the {name} of a row have different shapes {sorted(set(shapes))}; use a transform of fixed size"


def _decode_video(sample: Sample, number: int, transform: Any, info: MediaInfo) -> Tensor:
    extension, data = sample.media["video"][number]
    if extension != FRAMES_EXT:
        frames: Tensor = transform(data, planned=info).data
        return frames
    stored: Tensor = transform.stored(data, _times_of(sample, number), planned=info).data
    return stored


def _times_of(sample: Sample, number: int) -> Sequence[float]:
    """Times of the stored frames of a video; none where the record does not tell them."""
    times = sample.extra.get(FRAME_TIMES)
    if not isinstance(times, list):
        return ()
    if times and not isinstance(times[0], list):
        return times if number == 0 else ()
    return times[number] if number < len(times) else ()
