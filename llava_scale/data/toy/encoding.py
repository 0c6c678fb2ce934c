"""Synthetic frames and waves as real files: H.264 in MP4, and WAV, FLAC or MP3."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

VIDEO_RATE = 8
"""Frames a second of synthetic videos."""

SOUND_FILES: dict[str, str] = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame"}
"""Extension -> codec."""

_SOUND_OPTIONS = {"wav": {}, "flac": {"compression_level": "0"}, "mp3": {"compression_level": "9"}}  # the fastest

# The same frames must give the same bytes: one thread, and no look-ahead, which reads past the edges of tiny frames.
_VIDEO_OPTIONS = {
    "preset": "veryfast",
    "crf": "12",
    "threads": "1",
    "x264-params": "threads=1:lookahead-threads=1:rc-lookahead=0:no-mbtree=1",
}
_GROUP = 8


def encode_video(frames: NDArray[np.uint8], sound: NDArray[np.float32] | None = None, rate: int = 16_000) -> bytes:
    """An MP4 of RGB frames ``(T, H, W, 3)`` at ``VIDEO_RATE``, with ``sound`` (mono, ``rate``) as its track."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        stream: Any = output.add_stream("libx264", rate=VIDEO_RATE, options=_VIDEO_OPTIONS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size = "yuv420p", _GROUP
        track: Any = (
            None if sound is None else output.add_stream("aac", rate=rate, layout="mono", options={"aac_coder": "fast"})
        )
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
        if sound is not None:
            _encode_wave(output, track, sound, rate)
    return buffer.getvalue()


def encode_sound(wave: NDArray[np.float32], extension: str, rate: int) -> bytes:
    """A sound file of ``wave`` (mono, in [-1, 1]); ``extension`` is one of ``SOUND_FILES``."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=extension, options={"fflags": "+bitexact"}) as output:
        stream: Any = output.add_stream(
            SOUND_FILES[extension], rate=rate, layout="mono", options=_SOUND_OPTIONS[extension]
        )
        _encode_wave(output, stream, wave, rate)
    return buffer.getvalue()


def _encode_wave(output: Any, stream: Any, wave: NDArray[np.float32], rate: int) -> None:
    import av

    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave, np.float32)[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    size = stream.codec_context.frame_size or 1024
    resampler = av.AudioResampler(stream.codec_context.format.name, "mono", rate, frame_size=size)
    position = 0
    for part in (*resampler.resample(frame), *resampler.resample(None)):
        part.pts, part.time_base = position, Fraction(1, rate)
        position += part.samples
        output.mux(stream.encode(part))
    output.mux(stream.encode())
