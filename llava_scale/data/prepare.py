"""Media prepared for shards: pictures and frames at the model's size, sound as FLAC at the model's rate."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from llava_scale.data.names import NO_FRAME
from llava_scale.data.ppm import ppm_file
from llava_scale.data.shard_writer import NewMedia
from llava_scale.errors import ConfigError
from llava_scale.types import Clip, MediaInfo, MediaKind

if TYPE_CHECKING:
    from torch import Tensor

    from llava_scale.data.media import ImageTransform

_MAX_FRAMES = 1_000  # more would be a mistake: a frame number has nine digits, a row of tokens far fewer
_FLAC_BLOCK = 4_608
# Quick to decode: large frames, short predictors; 4 % more bytes than usual.
_FLAC = {"frame_size": str(_FLAC_BLOCK), "compression_level": "2"}
_TRACK_RATE = 16_000  # what audio towers hear


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaOptions:
    """What happens to media on their way into a shard.

    Attributes:
        image_size: Store pictures whose longer side is this, frames as squares of it; 0 copies files byte for byte.
        image_aspect: ``pad`` keeps the shape (readers pad to a square), ``resize`` stretches to a square.
        image_format: ``jpeg``, or ``ppm``: the very pixels, for eight to ten times the bytes and none of the decoding.
        image_quality: JPEG quality of prepared pictures, 1 to 100.
        image_background: RGB colour of the padding.
        video_frames: Store this many frames of each video, from the middles of equal spans, instead of the file.
        video_fps: Store this many frames of each second instead.
        audio_rate: Store sounds as FLAC with one channel at this rate; 0 copies files byte for byte.
        verify: ``decode`` decodes every picture that is copied, ``header`` trusts it when its header can be read.
        max_image_pixels: Larger pictures are bad records.
    """

    image_size: int = 0
    image_aspect: Literal["pad", "resize"] = "pad"
    image_format: Literal["jpeg", "ppm"] = "jpeg"
    image_quality: int = 90
    image_background: tuple[int, int, int] = (127, 127, 127)
    video_frames: int = 0
    video_fps: float = 0.0
    audio_rate: int = 0
    verify: Literal["decode", "header"] = "decode"
    max_image_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        if self.image_size < 0:
            raise ConfigError(f"image size must be at least 1, or 0 for faithful copies; got {self.image_size}")
        if not 1 <= self.image_quality <= 100:
            raise ConfigError(f"image quality must be in 1 to 100, got {self.image_quality}")
        if self.video_frames < 0 or self.video_fps < 0 or self.audio_rate < 0:
            raise ConfigError("video frames, frames a second and audio rate must not be negative")
        if self.video_frames and self.video_fps:
            raise ConfigError("frames of a video are stored by number or by rate, not both")
        if (self.video_frames or self.video_fps) and not self.image_size:
            raise ConfigError("stored frames need an image size: they are kept as the model takes them")

    def prepared(self) -> dict[str, Any]:
        """Return what ``dataset.json`` says of prepared media; empty where they are copies."""
        values = asdict(self)
        names = ["image_size", "image_aspect", "image_format", "image_background"] if self.image_size else []
        names += ["image_quality"] if self.image_size and self.image_format == "jpeg" else []
        names += [name for name in ("video_frames", "video_fps", "audio_rate") if values[name]]
        return {name: values[name] for name in names}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What becomes of one file: its members, and of a video the times of its frames, from the start of the clip."""

    media: tuple[NewMedia, ...]
    times_s: tuple[float, ...] = ()


def prepare(
    kind: MediaKind, number: int, data: bytes, options: MediaOptions, clip: Clip | None = None
) -> Prepared | None:
    """Prepare one file, or a clip of it; None where the options leave its kind as it is.

    Raises:
        SampleError: the file cannot be decoded.
    """
    if kind == "image" and options.image_size:
        pixels = _without_bars(_image_transform(options)(data), data, options)
        return Prepared((_picture("image", number, NO_FRAME, pixels, options),))
    if kind == "video" and stores_frames(options):
        return _frames(number, data, options, clip or (0.0, None))
    if kind == "audio" and options.audio_rate:
        return _sound(number, data, options.audio_rate, clip or (0.0, None))
    return None


def stores_frames(options: MediaOptions) -> bool:
    """Whether videos are stored as frames, without their files."""
    return bool(options.video_frames or options.video_fps)


def stored_track(number: int, data: bytes, options: MediaOptions, clip: Clip | None = None) -> Prepared:
    """The sound track of a video whose file is not kept, or a clip of it, as a FLAC at the rate of sounds or 16 kHz.

    Raises:
        SampleError: there is none, or it cannot be decoded.
    """
    return _sound(number, data, options.audio_rate or _TRACK_RATE, clip or (0.0, None))


def _sound(number: int, data: bytes, rate: int, clip: Clip) -> Prepared:
    from llava_scale.data.audio import AudioTransform

    wave = AudioTransform(sample_rate=rate)(data, start_s=clip[0], end_s=clip[1]).data
    info = MediaInfo(kind="audio", duration_s=len(wave) / rate)
    return Prepared((NewMedia("audio", "flac", number, NO_FRAME, _flac(wave, rate), info),))


def _frames(number: int, data: bytes, options: MediaOptions, clip: Clip) -> Prepared:
    from llava_scale.data.sampling import FrameSampling
    from llava_scale.data.video import VideoTransform

    if options.video_frames:
        how = FrameSampling(num_frames=options.video_frames, max_frames=options.video_frames)
    else:
        how = FrameSampling(scheme="time_fps", fps=options.video_fps, max_frames=_MAX_FRAMES)
    start_s, end_s = clip
    found = VideoTransform(image=_image_transform(options), sampling=how)(data, start_s=start_s, end_s=end_s)
    pictures = (_picture("video", number, place, pixels, options) for place, pixels in enumerate(found.data))
    return Prepared(tuple(pictures), tuple(round(max(0.0, time_s - start_s), 6) for time_s in found.times_s))


def _without_bars(pixels: Tensor, data: bytes, options: MediaOptions) -> Tensor:
    """Cut off the padding, equally much on both sides: readers pad again, exactly and for less than decoding bars."""
    from llava_scale.data.media import probe

    info = probe("jpg", data)  # any picture: bytes tell the format
    side = options.image_size
    if options.image_aspect != "pad" or info.width == info.height:
        return pixels
    axis = 1 if info.width > info.height else 2
    background = pixels.new_tensor(options.image_background)[:, None, None]
    is_bar = (pixels == background).all(dim=0).all(dim=2 - axis)
    inside = (~is_bar).nonzero()
    bars = side * (1 - min(info.width, info.height) / max(info.width, info.height)) / 2
    first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (side, -1)
    cut = min(int(bars), first, side - 1 - last, (side - 1) // 2)
    return pixels.narrow(axis, cut, side - 2 * cut)


def _picture(kind: MediaKind, number: int, frame: int, pixels: Tensor, options: MediaOptions) -> NewMedia:
    from PIL import Image

    rows = pixels.permute(1, 2, 0).contiguous().numpy()
    info = MediaInfo(kind=kind, width=rows.shape[1], height=rows.shape[0], num_frames=1)
    if options.image_format == "ppm":
        return NewMedia(kind, "ppm", number, frame, ppm_file(rows), info)
    buffer = io.BytesIO()
    Image.fromarray(rows).save(buffer, format="JPEG", quality=options.image_quality)
    return NewMedia(kind, "jpg", number, frame, buffer.getvalue(), info)


def _flac(wave: Tensor, rate: int) -> bytes:
    """16-bit FLAC of one channel in [-1, 1]."""
    import av

    buffer = io.BytesIO()
    samples = (wave * 32_768).round_().clamp_(-32_768, 32_767).short().numpy()
    with av.open(buffer, mode="w", format="flac", options={"fflags": "+bitexact"}) as output:
        stream: Any = output.add_stream("flac", rate=rate, layout="mono", options=_FLAC)
        for start in range(0, len(samples), _FLAC_BLOCK):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + _FLAC_BLOCK], format="s16", layout="mono")
            frame.sample_rate = rate
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


@lru_cache(maxsize=4)
def _image_transform(options: MediaOptions) -> ImageTransform:
    from llava_scale.data.media import ImageTransform

    return ImageTransform(
        size=options.image_size,
        aspect=options.image_aspect,
        background=options.image_background,
        max_pixels=options.max_image_pixels,
    )
