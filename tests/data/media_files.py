"""Videos whose frames show their own number, and sounds whose pitch tells the second."""

from __future__ import annotations

import functools
import io
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 160, 96
# The same frames must give the same bytes: x264's look-ahead reads past the edges of tiny frames.
_REPEATABLE = {"threads": "1", "x264-params": "threads=1:lookahead-threads=1:rc-lookahead=0:no-mbtree=1"}
"""Of the videos; each of the 16 blocks of a number is an eighth of both."""


def numbered_frame(number, width=WIDTH, height=HEIGHT):
    """RGB picture whose upper quarter shows ``number`` in 16 black and white blocks."""
    rows, cols = np.mgrid[:height, :width]
    pixels = np.stack([cols * 255 // width, rows * 255 // height, np.full_like(rows, 128)], axis=-1).astype(np.uint8)
    x, y = (number * 7) % (width - 16), height // 2 + (number * 5) % (height // 2 - 16)
    pixels[y : y + 16, x : x + 16] = (220, 40, 40)
    for bit in range(16):
        row, col = divmod(bit, 8)
        white = number >> (15 - bit) & 1
        top, left = row * height // 8, col * width // 8
        pixels[top : top + height // 8, left : left + width // 8] = 235 if white else 20
    return pixels


def read_number(picture, size, width=WIDTH, height=HEIGHT):
    """The number shown by a frame that was padded to a square and scaled to ``size``."""
    grey = picture.float().mean(0)
    scale = size / max(width, height)
    top, left = (size - height * scale) / 2, (size - width * scale) / 2
    number = 0
    for bit in range(16):
        row, col = divmod(bit, 8)
        y, x = top + (row + 0.5) * height * scale / 8, left + (col + 0.5) * width * scale / 8
        number = number * 2 + int(grey[int(y), int(x)] > 127)
    return number


@functools.cache
def numbered_video(
    container="mp4", codec="libx264", times_ms=tuple(range(0, 2000, 50)), gop=12, sound="", rotation=0, options=(),
    width=WIDTH, height=HEIGHT, index_first=False,
):  # fmt: skip
    """An encoded video with a frame at each time; with ``sound`` (a codec) tones of the same length."""
    muxer = {"movflags": "faststart"} if index_first else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        with av.open(str(path), "w", format=container, options=muxer) as output:
            stream = _video_stream(output, container, codec, times_ms, dict(options), (width, height))
            stream.gop_size = gop
            if rotation:
                stream.set_display_rotation(rotation)
            track = output.add_stream(sound, rate=48_000, layout="stereo") if sound else None
            for number, time_ms in enumerate(times_ms):
                frame = av.VideoFrame.from_ndarray(numbered_frame(number, width, height), format="rgb24")
                frame.time_base = stream.codec_context.time_base
                frame.pts = number if container == "avi" else time_ms
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
            if track is not None:
                _encode_sound(output, track, tones(times_ms[-1] / 1000 + 0.05, 48_000))
        return path.read_bytes()


def _video_stream(output, container, codec, times_ms, options, size):
    span_ms = times_ms[-1] - times_ms[0]
    rate = round(1000 * (len(times_ms) - 1) / span_ms) if span_ms else 25
    repeatable = _REPEATABLE if codec == "libx264" else {}
    stream = output.add_stream(codec, rate=rate, options=repeatable | options)
    stream.width, stream.height = size
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    stream.codec_context.time_base = Fraction(1, rate) if container == "avi" else Fraction(1, 1000)
    return stream


def tones(seconds, rate):
    """Second k is a sine of 500 + 100 k Hz at half the full scale."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (500 + 100 * np.floor(time)) * time)).astype(np.float32)


@functools.cache
def tone_file(container="wav", codec="pcm_s16le", rate=16_000, seconds=3.0, gains=(1.0,)):
    """An encoded sound of tones; each channel has its gain."""
    return sound_file(np.stack([tones(seconds, rate) * gain for gain in gains]), container, codec, rate)


def sound_file(channels, container="wav", codec="pcm_s16le", rate=16_000):
    """Encode float32 ``(C, N)``."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(channels)]
        stream = output.add_stream(codec, rate=rate, layout=layout)
        _encode_sound(output, stream, channels)
    return buffer.getvalue()


def _encode_sound(output, stream, samples):
    channels = np.broadcast_to(np.atleast_2d(samples), (stream.layout.nb_channels, samples.shape[-1]))
    resampler = av.AudioResampler(
        stream.format.name, stream.layout.name, stream.rate, frame_size=stream.frame_size or 1024
    )
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels, np.float32), "fltp", stream.layout.name)
    frame.sample_rate = stream.rate
    position = 0
    for converted in (*resampler.resample(frame), *resampler.resample(None)):
        converted.pts, converted.time_base = position, Fraction(1, stream.rate)
        position += converted.samples
        output.mux(stream.encode(converted))
    output.mux(stream.encode())


def pitch(wave, rate=16_000):
    """Frequency in Hz of the strongest tone."""
    spectrum = np.abs(np.fft.rfft(np.asarray(wave) * np.hanning(len(wave))))
    return float(spectrum.argmax()) * rate / len(wave)


def flip_bits(data, number, seed, first=0):
    """The file with ``number`` random bits inverted from byte ``first`` on."""
    rng = np.random.default_rng(seed)
    damaged = bytearray(data)
    for place in rng.integers(first, len(data), number):
        damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)
