"""Videos and sounds of one sample, decoded for the model.

Transforms are given to the loader by the model, which alone knows what its towers take:

- video: ``transform(data, planned=info)`` for an encoded file, ``transform.stored(pictures, times_s, planned=info)``
  for frames stored ahead of time; both return an object whose ``data`` is uint8 ``(F, 3, H, W)``.
- sound: ``transform(data, planned=info)`` returns ``AudioFeatures``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from llava_scale.data.records import encoded_media, split_frames
from llava_scale.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

    from llava_scale.data.features import Rows
    from llava_scale.types import AudioFeatures, EncodedMedium, MediaInfo, MediaKind, Sample


_PROBED_AS: dict[MediaKind, str] = {"image": "png", "video": "mp4", "audio": "wav"}
"""Any extension of each kind: what is inside a file is found out from its content."""


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
    media = encoded_media(sample)
    found: dict[MediaKind, list[Any]] = {"video": [], "audio": []}
    for kind, made in found.items():
        if kind not in leave and kind in media:
            planned = [info for info in infos if info.kind == kind]
            made += [
                decode_medium(medium, info, transforms[kind]) for medium, info in zip(media[kind], planned, strict=True)
            ]
    return OtherMedia([video.data for video in found["video"]], found["audio"])


def decode_medium(medium: EncodedMedium, info: MediaInfo, transform: Any) -> Any:
    """What ``transform`` makes of a video or sound, as planned by ``info``.

    Raises:
        SampleError: it cannot be decoded as planned.
    """
    if medium.clip is not None:
        info = replace(info, clip=medium.clip)
    if medium.times_s is None:
        return transform(medium.data, planned=info)
    return transform.stored(medium.data, medium.times_s, planned=info)


def medium_info(kind: MediaKind, medium: EncodedMedium) -> MediaInfo:
    """What an index would say of a medium; the format is told by its bytes.

    Raises:
        SampleError: its header cannot be read, or its clip lies behind the end.
    """
    from llava_scale.data.media import probe

    if medium.times_s is None:
        return probe(_PROBED_AS[kind], medium.data, medium.clip)
    frames = split_frames(medium.data)
    first = probe(_PROBED_AS["image"], frames[0][1])
    return replace(first, kind=kind, num_frames=len(frames), duration_s=max(0.0, *medium.times_s, 0.0))


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
