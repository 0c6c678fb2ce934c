"""Many decodes of good and broken files; slow."""

from __future__ import annotations

import gc
import threading
import time

import psutil
import pytest

from llava_scale.data.audio import AudioTransform
from llava_scale.data.media import ImageTransform, probe
from llava_scale.data.video import VideoTransform
from llava_scale.errors import SampleError
from tests.data.media_files import flip_bits, numbered_video, tone_file

VIDEOS = [
    ("mp4", numbered_video(times_ms=tuple(range(0, 600, 50)), sound="aac")),
    ("mkv", numbered_video(container="matroska", times_ms=tuple(range(0, 600, 50)))),
    ("webm", numbered_video(container="webm", codec="libvpx-vp9", times_ms=tuple(range(0, 300, 50)))),
    ("mov", numbered_video(container="mov", codec="mjpeg", times_ms=tuple(range(0, 300, 50)))),
    ("avi", numbered_video(container="avi", codec="mpeg4", times_ms=tuple(range(0, 600, 50)))),
]
SOUNDS = [
    ("wav", tone_file(seconds=0.5)),
    ("mp3", tone_file("mp3", "libmp3lame", 44_100, seconds=0.5)),
    ("flac", tone_file("flac", "flac", 44_100, seconds=0.5)),
    ("ogg", tone_file("ogg", "libopus", 48_000, seconds=0.5)),
    ("m4a", tone_file("ipod", "aac", 44_100, seconds=0.5)),
]
FILES = VIDEOS + SOUNDS
IMAGE = ImageTransform(size=32)


def decode(number, ext, data):
    """Decode by both policies in turn; returns how it went, in a word."""
    partial = ("forbid", "allow")[number % 2]
    try:
        probe(ext, data)
        if ext in dict(SOUNDS):
            found = AudioTransform(partial=partial)(data)
            return "partial" if found.lost_s else "whole"
        frames = VideoTransform(image=IMAGE, partial=partial)(data)
        if ext == "mp4" and number % 4 == 0:
            AudioTransform(partial=partial)(data)
        return "partial" if frames.num_damaged else "whole"
    except SampleError:
        return "refused"


@pytest.mark.slow
def test_a_thousand_files_with_inverted_bits_never_hang():
    outcomes = {"whole": 0, "partial": 0, "refused": 0}
    slowest = 0.0
    for seed in range(1_000):
        ext, data = FILES[seed % len(FILES)]
        damaged = flip_bits(data, 1 + seed % 60, seed)
        start = time.process_time()
        outcomes[decode(seed // len(FILES), ext, damaged)] += 1
        slowest = max(slowest, time.process_time() - start)
    assert min(outcomes.values()) > 20, outcomes
    assert slowest < 1.0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_decodes_leave_no_memory_and_no_threads_behind():
    broken = [(ext, flip_bits(data, 40, seed)) for seed, (ext, data) in enumerate(FILES)]
    cut = [(ext, data[: len(data) // 2]) for ext, data in FILES]
    files = FILES + broken + cut + [("mp4", b""), ("mp3", bytes(5_000))]
    process = psutil.Process()
    outcomes = set()
    before = 0
    for number in range(10_000):
        if number == 1_000:
            gc.collect()
            before = process.memory_info().rss
        outcomes.add(decode(number // len(files), *files[number % len(files)]))
    gc.collect()
    assert outcomes == {"whole", "partial", "refused"}
    assert (process.memory_info().rss - before) / 9_000 < 1_000  # bytes a decode
    assert process.num_threads() <= threading.active_count() + 8
