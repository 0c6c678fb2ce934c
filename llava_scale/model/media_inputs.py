"""Media in the forms that users have them in to the tensors that the model takes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from llava_scale.data.audio import AudioTransform
from llava_scale.data.media import probe
from llava_scale.errors import ConfigError, SampleError, ShapeError
from llava_scale.types import AudioFeatures, MediaTokens

if TYPE_CHECKING:
    from llava_scale.data.media import ImageTransform
    from llava_scale.model.processing import LlavaScaleProcessor
    from llava_scale.towers.audio_base import AudioFrontend
    from llava_scale.types import MediaInfo, MediaKind

Picture = Union[Image.Image, str, Path, bytes, "np.ndarray[Any, Any]", Tensor]
"""A Pillow image, a local path, an encoded file, a uint8 array ``(H, W, 3)`` or a uint8 tensor ``(3, H, W)``."""
Video = Union[str, Path, bytes, "np.ndarray[Any, Any]", Tensor]
"""A local path, an encoded file, or all frames as a uint8 array ``(F, H, W, 3)`` or tensor ``(F, 3, H, W)``."""
Sound = Union[str, Path, bytes, "np.ndarray[Any, Any]", Tensor]
"""A local path, an encoded file (also of a video, for its sound track), or samples ``(N,)`` in [-1, 1]."""


@dataclass(frozen=True, slots=True)
class SoundTransform:
    """Encoded sound, or the sound track of a video, to windows of features.

    Attributes:
        transform: Decodes to one channel at the front end's rate.
        frontend: Makes features.
    """

    transform: AudioTransform
    frontend: AudioFrontend

    def __call__(self, data: bytes, *, planned: MediaInfo | None = None) -> AudioFeatures:
        """Features of one sound, or of the clip that ``planned`` names; with it as many as were counted.

        Raises:
            SampleError: unreadable, without sound, over a limit, or damaged.
        """
        num_samples = 0 if planned is None else self.frontend.num_samples(planned.duration_s)
        start_s, end_s = (planned and planned.clip) or (0.0, None)
        return self.frontend(self.transform(data, num_samples=num_samples, start_s=start_s, end_s=end_s).data)

    def from_wave(self, wave: Tensor) -> AudioFeatures:
        """Features of a decoded sound ``(N,)`` in [-1, 1] at the front end's rate."""
        return self.frontend(wave)


@dataclass(frozen=True, slots=True)
class ReadMedia:
    """Inputs of the model, and per kind the tokens of each medium, to be taken in order of appearance."""

    tensors: dict[str, Tensor]
    tokens: Mapping[MediaKind, Iterator[MediaTokens]]


def read_media(
    processor: LlavaScaleProcessor, given: Mapping[MediaKind, Sequence[Any]], *, sampling_rate: int
) -> ReadMedia:
    """Decode media of all kinds.

    Raises:
        ConfigError: samples of another rate than the model's.
        SampleError: a file that cannot be decoded, or a kind that the model does not take.
        ShapeError: pixels or samples of a form that is not known.
    """
    tensors: dict[str, Tensor] = {}
    pictures, videos, sounds = given["image"], given["video"], given["audio"]
    tokens: dict[MediaKind, list[MediaTokens]] = {"image": [], "video": [], "audio": []}
    if pictures:
        transform = processor.image_transform
        tensors["pixel_values"] = torch.stack([picture_tensor(picture, transform) for picture in pictures])
    if videos:
        seen = [_frames(video, processor) for video in videos]
        tokens["video"] = [counted for _, counted in seen]
        tensors["pixel_values_videos"] = torch.cat([frames for frames, _ in seen])
        tensors["video_grids"] = torch.tensor([counted.grid for counted in tokens["video"]])
    if sounds:
        found = [_sound(sound, processor, sampling_rate) for sound in sounds]
        tokens["audio"] = [counted for _, counted in found]
        windows = AudioFeatures.joined([features for features, _ in found])
        tensors |= {"audio_values": windows.values, "audio_lengths": windows.lengths}
        tensors["audio_grids"] = torch.tensor([counted.grid for counted in tokens["audio"]])
    return ReadMedia(tensors, {kind: iter(counted) for kind, counted in tokens.items()})


def picture_tensor(picture: Picture, transform: ImageTransform) -> Tensor:
    """One picture as the uint8 square that training would have seen."""
    if isinstance(picture, str | Path):
        picture = Path(picture).read_bytes()
    if isinstance(picture, Image.Image):
        picture = _lossless(picture)
    if isinstance(picture, bytes):
        return transform(picture)
    if isinstance(picture, np.ndarray):
        picture = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        raise ShapeError(
            f"a picture must be uint8 RGB, (3, H, W) as a tensor or (H, W, 3) as an array, "
            f"got {picture.dtype} {tuple(picture.shape)}"
        )
    return transform.from_tensor(picture)


def flatten(items: Any) -> list[Any]:
    """Media in order, out of lists of any depth; None is none."""
    if items is None:
        return []
    if not isinstance(items, list | tuple):
        return [items]
    return [medium for item in items for medium in flatten(item)]


def _frames(video: Video, processor: LlavaScaleProcessor) -> tuple[Tensor, MediaTokens]:
    """Frames of one video as training would have seen them, and the tokens that become of them."""
    counter = processor.token_counter
    if isinstance(video, str | Path):
        video = _file(video)
    if isinstance(video, bytes):
        info = probe("mp4", video)
        return processor.video_transform(video, planned=info).data, counter.count(info, step=None)
    if counter.stamps is not None:
        raise ConfigError("this model reads the times of frames (model.video.timestamps); give the video as a file")
    if isinstance(video, np.ndarray):
        video = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2)
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[1] != 3 or not len(video):
        raise ShapeError(
            f"a video must be uint8 RGB, (F, 3, H, W) as a tensor or (F, H, W, 3) as an array, "
            f"got {video.dtype} {tuple(video.shape)}"
        )
    frames = torch.stack([processor.image_transform.from_tensor(frame) for frame in video])
    return frames, counter.visual(len(frames), step=None)


def _sound(sound: Sound, processor: LlavaScaleProcessor, sampling_rate: int) -> tuple[AudioFeatures, MediaTokens]:
    """Features of one sound, and the tokens that become of it."""
    transform: SoundTransform | None = processor.media_transforms.get("audio")
    if transform is None:
        raise SampleError("this model does not hear: it was built without model.audio_tower")
    rate = transform.frontend.sample_rate
    if isinstance(sound, str | Path):
        sound = _file(sound)
    if isinstance(sound, bytes):
        info = probe("wav", sound)
        return transform(sound, planned=info), processor.token_counter.count(info, step=None)
    wave = torch.as_tensor(np.asarray(sound)) if isinstance(sound, np.ndarray) else sound
    if wave.ndim != 1 or not wave.is_floating_point():
        raise ShapeError(f"a sound must be floating point samples (N,), got {wave.dtype} {tuple(wave.shape)}")
    if sampling_rate not in (0, rate):
        raise ConfigError(f"samples come at {sampling_rate} Hz, the audio tower wants {rate}; give the file instead")
    return transform.from_wave(wave.float()), processor.token_counter.sound(len(wave), step=None)


def _file(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise SampleError(f"cannot read {path}: {error}") from None


def _lossless(picture: Image.Image) -> bytes:
    """The picture as an encoded file, so that every kind of it is decoded by the same rules as in training."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        upright = upright.convert("RGB")
    buffer = io.BytesIO()
    upright.save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()
