"""Videos as strips of frames and sounds as players with waveform and spectrogram, for pages that stand alone."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from llava_scale.data.audio import AudioTransform
from llava_scale.data.media import ImageTransform, decode_image
from llava_scale.data.names import EXTENSIONS
from llava_scale.data.records import FRAMES_EXT, split_frames
from llava_scale.data.video import VideoTransform
from llava_scale.towers.fbank import Fbank
from llava_scale.viz.page import picture, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from llava_scale.types import Clip, MediaInfo

CSS = """
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(84px,1fr));gap:5px}
.strip figure{min-width:0}
.strip img{border:1px solid var(--line);border-radius:4px;background:#fff}
.strip.small img{image-rendering:pixelated}
.strip figcaption{margin-top:1px;font-size:.72rem;text-align:center;font-variant-numeric:tabular-nums}
video.player{width:100%;max-height:260px;border-radius:6px;background:#000;margin-bottom:6px}
audio.player{width:100%;height:38px;margin-bottom:4px}
.heard img{width:100%;border:1px solid var(--line);border-radius:4px;display:block}
.heard .wave{height:58px;border-bottom:0;border-radius:4px 4px 0 0}
.heard .bands{height:110px;border-radius:0 0 4px 4px}
.axis{display:flex;justify-content:space-between;font-size:.72rem;color:var(--soft);font-variant-numeric:tabular-nums}
"""

_MIMES = {"mp3": "audio/mpeg", "wav": "audio/wav", "flac": "audio/flac", "ogg": "audio/ogg", "m4a": "audio/mp4"}
_VIDEO_MIMES = {"mp4": "video/mp4", "webm": "video/webm", "mov": "video/mp4", "mkv": "video/webm"}
_MAX_PLAYED = 4 << 20
"""Bytes of a file that a page carries for its player."""
_MAX_PIXELS = 100_000_000
_MAX_SHOWN = 32
_PREVIEW_SIDE = 160
_WIDTH, _WAVE_HEIGHT = 640, 72
_RATE = 16_000
_JPEG_START = bytes([0xFF, 0xD8])
_INK, _FLOOR_DB = (37, 99, 235), 60.0
_HEAT = np.array([(10, 8, 34), (74, 20, 110), (160, 42, 104), (227, 89, 51), (249, 164, 26), (252, 250, 180)])


def video_figure(
    title: str, ext: str, data: bytes, info: MediaInfo, transform: VideoTransform | None, note: str
) -> str:
    """Player and frames of a video: those that the model sees with their times, else some spread over it.

    Args:
        title: Words for the caption.
        ext: Extension; of frames stored ahead of time ``records.FRAMES_EXT``.
        data: The whole file.
        info: What the index says of it.
        transform: How the model sees videos; None where no model is known.
        note: What follows the caption of the frames.

    Raises:
        SampleError: it cannot be decoded as training would.
    """
    if transform is None and ext == FRAMES_EXT:
        return _stored_figure(title, data)
    how = transform or VideoTransform(image=ImageTransform(_PREVIEW_SIDE, "pad", (255, 255, 255), _MAX_PIXELS))
    frames = how.stored(data, planned=info) if ext == FRAMES_EXT else how(data, planned=info)
    seen = "as the model sees it" if transform else "frames from it"
    side = how.image.size
    shown = [(_png(frame), f"{time:.2f} s") for frame, time in zip(frames.data, frames.times_s, strict=True)]
    caption = f"{title} · {seen}: {len(shown)} frames of {side} × {side}{note}"
    if ext == FRAMES_EXT:
        shown = [(frame, f"frame {number}") for number, (frame, _) in enumerate(shown)]
    player = _player("video", _VIDEO_MIMES.get(ext, ""), data)
    return f"<figure>{player}{_strip(shown, small=side < _PREVIEW_SIDE // 2)}{_caption(caption)}</figure>"


def sound_figure(title: str, ext: str, data: bytes, note: str, *, clip: Clip | None = None) -> str:
    """Player, waveform and spectrogram of a sound or of the sound track of a video, or of a clip.

    Raises:
        SampleError: it cannot be decoded.
    """
    start_s, end_s = clip or (0.0, None)
    wave = AudioTransform(sample_rate=_RATE)(data, start_s=start_s, end_s=end_s).data
    seconds = len(wave) / _RATE
    if clip is not None:
        title, player = f"{title} from {start_s:g} s on", _player("audio", "audio/wav", _wav(wave))
    elif EXTENSIONS.get(ext) == "video":
        title, player = f"{title} (sound track)", _player("audio", "audio/wav", _wav(wave))
    else:
        player = _player("audio", _MIMES.get(ext, ""), data)
    drawn = picture(_waveform(wave), mime="image/png", alt=f"waveform of {title}").replace(
        "<img", '<img class="wave"', 1
    )
    bands = picture(spectrogram(wave), mime="image/png", alt=f"spectrogram of {title}")
    drawn += bands.replace("<img", '<img class="bands"', 1)
    axis = f'<div class="axis"><span>0 s</span><span>{seconds / 2:.2f} s</span><span>{seconds:.2f} s</span></div>'
    caption = f"{title} · one channel at 16 kHz; 128 mel bands up to 8 kHz{note}"
    return f'<figure class="heard">{player}{drawn}{axis}{_caption(caption)}</figure>'


def spectrogram(wave: Tensor) -> bytes:
    """PNG of the filter bank that BEATs hears, low bands at the bottom, brightest for the loudest."""
    import torch

    padded = torch.nn.functional.pad(wave, (0, max(0, 400 - len(wave))))
    decibels = Fbank()(padded).numpy().T[::-1] * (10 / np.log(10))
    top = float(decibels.max())
    share = np.clip((decibels - top + _FLOOR_DB) / _FLOOR_DB, 0, 1) * (len(_HEAT) - 1)
    below = np.minimum(share.astype(int), len(_HEAT) - 2)
    colours = _HEAT[below] + (share - below)[..., None] * (_HEAT[below + 1] - _HEAT[below])
    image = Image.fromarray(colours.round().astype(np.uint8))
    return _encoded(image.resize((_WIDTH, image.height), Image.Resampling.BILINEAR))


def _waveform(wave: Tensor) -> bytes:
    """PNG of lowest and highest sample in each column."""
    samples = wave.numpy()
    if len(samples) < _WIDTH:
        samples = np.interp(np.linspace(0, len(samples) - 1, _WIDTH), np.arange(len(samples)), samples)
    columns = np.array_split(samples, _WIDTH)
    middle = (_WAVE_HEIGHT - 1) / 2
    rows = np.arange(_WAVE_HEIGHT)[:, None]
    high = np.array([middle - middle * column.max() for column in columns]).round()
    low = np.array([middle - middle * column.min() for column in columns]).round()
    pixels: NDArray[np.uint8] = np.full((_WAVE_HEIGHT, _WIDTH, 3), 255, np.uint8)
    pixels[(rows >= high) & (rows <= low)] = _INK
    return _encoded(Image.fromarray(pixels))


def _stored_figure(title: str, data: bytes) -> str:
    frames = [frame for _, frame in split_frames(data)]
    shown = [
        (_jpeg(decode_image(frame, max_pixels=_MAX_PIXELS)), f"frame {number}")
        for number, frame in enumerate(frames[:_MAX_SHOWN])
    ]
    more = f", the first {len(shown)} shown" if len(frames) > len(shown) else ""
    return f"<figure>{_strip(shown)}{_caption(f'{title} · {len(frames)} frames as stored{more}')}</figure>"


def _strip(frames: Sequence[tuple[bytes, str]], *, small: bool = False) -> str:
    cells = []
    for frame, name in frames:
        mime = "image/jpeg" if frame.startswith(_JPEG_START) else "image/png"
        cells.append(f"<figure>{picture(frame, mime=mime, alt=name)}{_caption(name)}</figure>")
    names = "strip small" if small else "strip"
    return f'<div class="{names}">{"".join(cells)}</div>'


def _player(tag: str, mime: str, data: bytes) -> str:
    """A player that carries the file, where browsers know its form and it is not too large."""
    if not mime:
        return ""
    if len(data) > _MAX_PLAYED:
        return f'<p class="soft">too large to be played in this page ({len(data) / 2**20:.1f} MB)</p>'
    source = base64.b64encode(data).decode()
    return f'<{tag} class="player" controls preload="metadata" src="data:{mime};base64,{source}"></{tag}>'


def _caption(words: str) -> str:
    return f"<figcaption>{text(words)}</figcaption>"


def _wav(wave: Tensor) -> bytes:
    import wave as files

    buffer = io.BytesIO()
    with files.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes((wave * 32_767).round().short().numpy().tobytes())
    return buffer.getvalue()


def _png(pixels: Tensor) -> bytes:
    return _encoded(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))


def _jpeg(pixels: Tensor) -> bytes:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((2 * _PREVIEW_SIDE, 2 * _PREVIEW_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
