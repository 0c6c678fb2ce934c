"""Frames and seconds of videos and sounds, without decoding them."""

from __future__ import annotations

from typing import Any

from llava_scale.data.containers import MediaLimits, opened, packets_of, seconds, sound_end_s
from llava_scale.data.video_reader import VideoReader
from llava_scale.errors import SampleError
from llava_scale.types import Clip, MediaInfo, MediaKind


def probe_container(kind: MediaKind, data: bytes, clip: Clip | None = None) -> MediaInfo:
    """What a video or sound holds, or a clip of it, by its header where that tells it, else by its packets.

    Raises:
        SampleError: a header that cannot be read, nothing of this kind in the file, or a clip behind its end.
    """
    with opened(data, kind) as container:
        stream = container.streams.best("video" if kind == "video" else "audio")
        if stream is None or stream.codec_context is None:
            raise SampleError(f"{kind} file without {'pictures' if kind == 'video' else 'sound'} that can be decoded")
        if kind == "audio":
            return MediaInfo(kind="audio", duration_s=_cut(_sound_seconds(container, stream, data), clip), clip=clip)
        size = {"width": stream.codec_context.width, "height": stream.codec_context.height}
        if clip is not None:
            inside, begins, until = VideoReader(container, MediaLimits(), *clip).within(*clip)
            duration_s, num_frames = until - begins[0], len(inside)
            return MediaInfo(kind="video", **size, num_frames=num_frames, duration_s=duration_s, clip=clip)
        num_frames, known_s = stream.frames, seconds(stream.duration, stream.time_base)
        if not num_frames or known_s is None:
            num_frames, known_s = _count_frames(container, stream)
        return MediaInfo(kind="video", **size, num_frames=num_frames, duration_s=known_s)


def _cut(duration_s: float, clip: Clip | None) -> float:
    """Seconds of a clip of a sound."""
    if clip is None:
        return duration_s
    start_s, end_s = clip
    until_s = duration_s if end_s is None else min(end_s, duration_s)
    if until_s <= start_s:
        raise SampleError(f"the clip begins at {start_s:g} s, but the sound lasts {duration_s:.2f} s")
    return until_s - start_s


def _sound_seconds(container: Any, stream: Any, data: bytes) -> float:
    """Length by the header, else by the packets."""
    begin_s = seconds(stream.start_time, stream.time_base) or 0.0
    length_s = sound_end_s(container, stream, data, begin_s)
    if length_s is not None:
        return length_s
    durations = (packet.duration or 0 for packet in packets_of(container, stream, MediaLimits()))
    return float(sum(durations) * stream.time_base)


def _count_frames(container: Any, stream: Any) -> tuple[int, float]:
    """Frames and seconds that they are shown for, by the packets."""
    packets = [(p.pts, p.duration or 0) for p in packets_of(container, stream, MediaLimits()) if not p.is_discard]
    stamps = sorted((pts, duration) for pts, duration in packets if pts is not None)
    if len(stamps) < len(packets) or not packets:
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        return len(packets), len(packets) / rate
    typical = (stamps[-1][0] - stamps[0][0]) / max(1, len(stamps) - 1)
    span = stamps[-1][0] - stamps[0][0] + (stamps[-1][1] or typical)
    return len(packets), float(span * stream.time_base)
