"""Opening video and sound files that come from anywhere: in memory, with limits, errors as ours."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from llava_scale.errors import ConfigError, SampleError

if TYPE_CHECKING:
    from collections.abc import Iterable

PartialPolicy = Literal["forbid", "allow"]
"""What becomes of damaged files: an error of the sample, or what can be decoded of them."""

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mp3,wav,w64,flac,ogg,aac"
"""What FFmpeg may open; playlists are left out because they name other files and URLs."""

_ATTACHED_PICTURE = 0x400
_BUFFER_BYTES = 1 << 18
_DISCARD_ALL = 48  # FFmpeg's AVDISCARD_ALL
_MAX_ERRORS_IN_A_ROW = 2_000
_PACKETS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """What a video or sound may cost.

    Attributes:
        max_pixels: Most pixels of a frame.
        max_seconds: Longest video or sound that is decoded; of a longer file a clip may still be taken.
        max_packets: Most packets that are read.
    """

    max_pixels: int = 40_000_000
    max_seconds: float = 7_200.0
    max_packets: int = 2_000_000

    def __post_init__(self) -> None:
        if min(self.max_pixels, self.max_packets) < 1 or not self.max_seconds > 0:
            raise ConfigError(f"limits of media must be positive, got {self}")


@contextmanager
def opened(data: bytes, name: str) -> Iterator[Any]:
    """The file as a PyAV container; FFmpeg's errors inside the block become ours.

    Args:
        data: The whole file.
        name: What it is, for messages: ``video``.

    Raises:
        SampleError: an empty file or one that FFmpeg cannot open.
    """
    import av  # slow to import and not needed for pictures

    if not data:
        raise SampleError(f"empty {name} file (0 bytes)")
    # One probed packet: FFmpeg would else search each WAV for DTS in disguise, which takes longer than to decode it.
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none", "max_probe_packets": "1"}
    try:
        container = av.open(
            io.BytesIO(data), mode="r", options=options, metadata_errors="ignore", buffer_size=_BUFFER_BYTES
        )
    except (av.FFmpegError, ValueError) as error:
        raise SampleError(f"unreadable {name} file of {len(data)} bytes: {reason(error)}") from error
    try:
        yield container
    except av.FFmpegError as error:
        raise SampleError(f"unreadable {name} file of {len(data)} bytes: {reason(error)}") from error
    finally:
        container.close()


def packets_of(container: Any, stream: Any, limits: MediaLimits) -> Iterator[Any]:
    """The packets of a stream in the order of decoding; damage between them is skipped, other streams are not read.

    Raises:
        SampleError: more packets than allowed, or damage without end.
    """
    import av

    leave_out_others(container, stream)
    number = errors = 0
    packets = container.demux(stream)
    while True:
        some: list[Any] = []
        failure = None
        try:
            some.extend(islice(packets, _PACKETS_AT_ONCE))  # keeps what came before an error
        except av.FFmpegError as error:
            failure = error
        kept = [packet for packet in some if packet.size]  # the last one is empty: it tells the decoder to finish
        number += len(kept)
        if number > limits.max_packets:
            raise SampleError(f"the file has more than {limits.max_packets} packets, the limit")
        yield from kept
        if failure is not None:
            errors = 1 if kept else errors + 1
            if isinstance(failure, EOFError) or errors > _MAX_ERRORS_IN_A_ROW:
                return
            packets = container.demux(stream)
        elif len(some) < _PACKETS_AT_ONCE:
            return


def leave_out_others(container: Any, stream: Any) -> None:
    """Read no packets of other streams."""
    for other in container.streams:
        if other.index != stream.index and hasattr(other, "discard"):
            other.discard = _DISCARD_ALL


def decoded(context: Any, packet: Any) -> tuple[Iterable[Any], bool]:
    """The frames that a packet (None at the end) completes, and whether it could be decoded."""
    try:
        return context.decode(packet), True
    except _decode_errors():  # asked for only when there is one
        return (), False


@cache
def _decode_errors() -> tuple[type[Exception], ...]:
    import av

    return (av.FFmpegError, ValueError)


def seconds(value: int | None, time_base: Any) -> float | None:
    """A time stamp in seconds, None where the file tells none."""
    return None if value is None or time_base is None else float(value * time_base)


def tagged_seconds(stream: Any) -> float | None:
    """Duration that Matroska writers note per stream, as ``00:01:02.500000000``."""
    parts = str(stream.metadata.get("DURATION", "")).split(":")
    try:
        hours, minutes, rest = map(float, parts)
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + rest


def is_cover(stream: Any) -> bool:
    """Whether a video stream is only the picture on a record's cover."""
    return bool(int(getattr(stream, "disposition", 0)) & _ATTACHED_PICTURE)


def sound_end_s(container: Any, stream: Any, data: bytes, origin_s: float) -> float | None:
    """End of a sound track by its header, from ``origin_s``; None where the header only guesses."""
    if container.format.name == "mp3" and not _mp3_is_counted(data):
        return None
    length_s = seconds(stream.duration, stream.time_base)
    if length_s is not None:
        return (seconds(stream.start_time, stream.time_base) or 0.0) - origin_s + length_s
    return tagged_seconds(stream)


def _mp3_is_counted(data: bytes) -> bool:
    """Whether an encoder noted the number of frames; else FFmpeg guesses the length from the first frame's bit rate."""
    start = 0
    if data[:3] == b"ID3" and len(data) > 10:
        start = 10 + sum((data[6 + i] & 0x7F) << (7 * (3 - i)) for i in range(4))
    head = data[start : start + 2_048]
    return any(tag in head for tag in (b"Xing", b"Info", b"VBRI"))


def reason(error: Exception) -> str:
    """An error of a library in one line."""
    text = str(error).split(": '<none>'")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
