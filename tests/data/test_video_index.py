"""Reading by the index gives what reading every packet gives."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from llava_scale.data import video_index
from llava_scale.data.containers import MediaLimits, opened
from llava_scale.data.media import ImageTransform
from llava_scale.data.sampling import FrameSampling, uniform_indices
from llava_scale.data.video import VideoTransform
from llava_scale.data.video_index import IndexedReader, IndexMismatchError
from llava_scale.data.video_reader import VideoReader
from llava_scale.errors import SampleError
from tests.data.media_files import flip_bits, numbered_video, read_number

LISTED = {
    "h264 with B-frames": {},
    "sound between, index first": {"sound": "aac", "index_first": True},
    "one group": {"gop": 250},
    "key frames only": {"gop": 1},
    "HEVC": {"codec": "libx265", "options": (("x265-params", "open-gop=0"),)},
    "motion JPEG": {"container": "mov", "codec": "mjpeg"},
}
UNLISTED = {
    "variable rate": {"times_ms": (0, 33, 66, 100, 133, 166, 200, 1200, 2200, 2300)},
    "Matroska": {"container": "matroska"},
    "AVI": {"container": "avi", "codec": "mpeg4"},
    "one frame": {"times_ms": (0,)},
}
LIMITS = MediaLimits()


@pytest.fixture(autouse=True)
def pays_at_once(monkeypatch):
    monkeypatch.setattr(video_index, "_PAYS_FROM", 2)


def sampled(data, number=5, partial="forbid"):
    """Numbers read from the frames and how many are damaged, or what is wrong."""
    sampling = FrameSampling(scheme="uniform", num_frames=number, max_frames=number)
    try:
        frames = VideoTransform(image=ImageTransform(size=160), sampling=sampling, partial=partial)(data)
    except SampleError as error:
        return str(error)
    return [read_number(picture, 160) for picture in frames.data], frames.times_s, frames.num_damaged


def by_reading_all(monkeypatch, data, **how):
    with monkeypatch.context() as context:
        context.setattr(video_index, "_PAYS_FROM", 10**9)
        return sampled(data, **how)


@pytest.mark.parametrize("kind", LISTED)
def test_the_same_frames_come_as_from_reading_every_packet(kind):
    data = numbered_video(**LISTED[kind])
    rng = random.Random(0)
    with opened(data, "video") as first, opened(data, "video") as second:
        indexed, full = IndexedReader.of(first, LIMITS), VideoReader(second, LIMITS)
        assert (indexed.times_s, indexed.end_s, indexed.cut_off) == (full.times_s, full.end_s, "")
        number = len(full.times_s)
        choices = [sorted(rng.sample(range(number), rng.randint(1, 5))) for _ in range(6)]
        for chosen in (*choices, [0], [number - 1], list(range(number))):
            pairs = list(zip(indexed.decode(chosen), full.decode(chosen), strict=True))
            assert [mine[0] for mine, _ in pairs] == chosen
            for (mine, frame), (other, expected) in pairs:
                assert mine == other
                assert frame.pts == expected.pts
                assert np.array_equal(frame.to_ndarray(format="rgb24"), expected.to_ndarray(format="rgb24"))
        assert [number for number, _ in indexed.decode_all()] == list(range(number))


@pytest.mark.parametrize("kind", UNLISTED)
def test_files_whose_index_does_not_tell_the_times_are_read_whole(kind):
    with opened(numbered_video(**UNLISTED[kind]), "video") as container:
        assert IndexedReader.of(container, LIMITS) is None


def test_short_and_cut_off_files_are_read_whole(monkeypatch):
    data = numbered_video(index_first=True)
    with opened(data[: len(data) * 3 // 4], "video") as container:
        assert IndexedReader.of(container, LIMITS) is None
    monkeypatch.setattr(video_index, "_PAYS_FROM", 100)
    with opened(data, "video") as container:
        assert IndexedReader.of(container, LIMITS) is None


def test_packets_beside_their_place_in_the_index_make_it_read_everything(monkeypatch):
    data = bytearray(numbered_video())
    table = data.index(b"ctts")
    (number,) = struct.unpack_from(">I", data, table + 8)
    place = table + 12 + 8 * (number // 2) + 4
    (offset,) = struct.unpack_from(">i", data, place)
    struct.pack_into(">i", data, place, offset + 7)
    data = bytes(data)
    with opened(data, "video") as container:
        assert IndexedReader.of(container, LIMITS) is not None
    found = sampled(data, number=40)
    assert found == by_reading_all(monkeypatch, data, number=40)
    assert len(set(np.diff(found[1]).round(4))) > 1


def test_groups_that_lean_on_the_one_before_are_read_whole(monkeypatch):
    data = numbered_video(codec="libx265", options=(("x265-params", "open-gop=1:bframes=3"),))
    with opened(data, "video") as container:
        reader = IndexedReader.of(container, LIMITS)
        with pytest.raises(IndexMismatchError):
            list(reader.decode_all())
    assert sampled(data, number=40) == by_reading_all(monkeypatch, data, number=40)
    assert sampled(data, number=40)[0] == uniform_indices(40, 40)


@pytest.mark.parametrize("partial", ["forbid", "allow"])
def test_damaged_files_come_out_as_from_reading_every_packet(monkeypatch, partial):
    data = numbered_video(sound="aac", index_first=True)
    start = data.index(b"mdat")
    for seed in range(60):
        broken = flip_bits(data, 3, seed, first=start)
        assert sampled(broken, partial=partial) == by_reading_all(monkeypatch, broken, partial=partial)
