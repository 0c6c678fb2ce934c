from __future__ import annotations

import io
import pickle
import random
import time

import av
import numpy as np
import pytest
import torch
from PIL import Image

from llava_scale.data.containers import MediaLimits
from llava_scale.data.media import ImageTransform, probe
from llava_scale.data.records import join_frames
from llava_scale.data.sampling import FrameSampling, middles, shown_at
from llava_scale.data.video import VideoTransform
from llava_scale.errors import ConfigError, SampleError
from tests.data.media_files import HEIGHT, WIDTH, flip_bits, numbered_frame, numbered_video, read_number, tone_file

SIZE = 160
IMAGE = ImageTransform(size=SIZE)
PAUSING = (0, 33, 66, 100, 133, 166, 200, 1200, 2200, 2300, 2400, 2500, 4500, 4600, 4700)
KINDS = {
    "h264 with B-frames": {},
    "open groups": {"options": (("x264-params", "open-gop=1:bframes=3:b-pyramid=2"),), "container": "matroska"},
    "one group": {"gop": 250},
    "key frames only": {"gop": 1},
    "variable rate": {"times_ms": PAUSING},
    "VP9 without a count": {"container": "webm", "codec": "libvpx-vp9"},
    "late start": {"container": "matroska", "times_ms": tuple(range(1500, 3500, 100))},
    "HEVC": {"codec": "libx265", "options": ()},
    "motion JPEG": {"container": "mov", "codec": "mjpeg"},
    "AVI without time stamps": {"container": "avi", "codec": "mpeg4"},
    "one frame": {"times_ms": (0,)},
}


def decoded(data, *, partial="forbid", limits=None, start_s=0.0, end_s=None, planned=None, image=IMAGE, **sampling):
    how = VideoTransform(
        image=image, sampling=FrameSampling(**sampling), partial=partial, limits=limits or MediaLimits()
    )
    return how(data, start_s=start_s, end_s=end_s, planned=planned)


def every_frame(data, **how):
    """All frames in order."""
    number = probe("mp4", data).num_frames
    return decoded(data, scheme="transformers", num_frames=number, max_frames=number, **how)


def numbers(frames, **size):
    return [read_number(picture, SIZE, **size) for picture in frames.data]


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_found_with_its_time(kind):
    data = numbered_video(**KINDS[kind])
    times_ms = KINDS[kind].get("times_ms", tuple(range(0, 2000, 50)))
    frames = every_frame(data)
    assert numbers(frames) == list(range(len(times_ms)))
    assert frames.times_s == pytest.approx([time_ms / 1000 for time_ms in times_ms], abs=1e-3)
    assert frames.num_damaged == 0


@pytest.mark.parametrize("kind", KINDS)
def test_frames_by_time_are_those_shown_then(kind):
    data = numbered_video(**KINDS[kind])
    times = every_frame(data).times_s
    frames = decoded(data, num_frames=5)
    end = times[-1] + probe("mp4", data).duration_s - (times[-1] - times[0]) if len(times) > 1 else times[0] + 0.04
    expected = shown_at(middles(times[0], end, 5), times)
    assert max(abs(a - b) for a, b in zip(numbers(frames), expected, strict=True)) <= (1 if len(times) > 1 else 0)
    assert frames.times_s == tuple(times[number] for number in numbers(frames))


@pytest.mark.parametrize("kind", ["h264 with B-frames", "open groups", "VP9 without a count", "HEVC", "one group"])
def test_frames_decoded_alone_equal_those_of_decoding_everything(kind):
    data = numbered_video(**KINDS[kind])
    everything = every_frame(data).data
    rng = random.Random(0)
    for _ in range(6):
        start = rng.uniform(0, 1.5)
        frames = decoded(data, num_frames=rng.randint(1, 4), start_s=start, end_s=start + rng.uniform(0.1, 0.5))
        shown = numbers(frames)
        assert torch.equal(frames.data, everything[shown])


def test_the_originals_indices_are_decoded():
    frames = decoded(numbered_video(), scheme="uniform", num_frames=8)
    assert numbers(frames) == [2, 7, 12, 17, 22, 26, 31, 36]


def test_frames_shown_for_long_come_several_times():
    frames = decoded(numbered_video(times_ms=PAUSING), num_frames=16)
    assert len(set(numbers(frames))) < 16
    assert numbers(frames) == sorted(numbers(frames))
    alike = [place for place in range(15) if frames.times_s[place] == frames.times_s[place + 1]]
    assert alike
    assert all(torch.equal(frames.data[place], frames.data[place + 1]) for place in alike)


def test_clips_are_cut_by_seconds_also_far_into_the_file():
    data = numbered_video(times_ms=tuple(range(0, 12_000, 100)), gop=20, sound="aac")
    assert numbers(decoded(data, num_frames=4, start_s=1.0, end_s=1.4)) == [10, 11, 12, 13]
    assert numbers(decoded(data, num_frames=4, start_s=9.0, end_s=9.4)) == [90, 91, 92, 93]
    assert numbers(decoded(data, num_frames=2, start_s=11.0)) == [112, 117]
    assert numbers(decoded(data, num_frames=1, start_s=7.33, end_s=7.36)) == [73]  # shown since 7.3 s


@pytest.mark.parametrize(("start_s", "end_s"), [(3.0, None), (2.5, 2.6)])
def test_clips_without_frames_are_refused(start_s, end_s):
    with pytest.raises(SampleError, match="no frame between"):
        decoded(numbered_video(), start_s=start_s, end_s=end_s)


def test_clips_that_end_before_they_start_are_refused():
    with pytest.raises(SampleError, match="not after its start"):
        decoded(numbered_video(), start_s=1.0, end_s=1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["time", "time_fps", "uniform", "fps", "videollama2", "llava_next"])
def test_as_many_frames_come_as_the_header_promised(kind, scheme):
    data = numbered_video(**KINDS[kind])
    planned = probe("mp4", data)
    planned = type(planned)(kind="video", num_frames=planned.num_frames, duration_s=round(planned.duration_s, 3))
    how = VideoTransform(image=ImageTransform(size=16), sampling=FrameSampling(scheme=scheme, fps=4.0))
    assert len(how(data, planned=planned).data) == how.num_frames(planned)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_videos_filmed_with_a_turned_camera_are_upright(rotation):
    plain = decoded(numbered_video(), num_frames=2).data
    upright = decoded(numbered_video(rotation=rotation), num_frames=2).data
    counterclockwise = torch.rot90(plain, rotation // 90, (2, 3))
    assert (counterclockwise.int() - upright.int()).abs().max() <= 2


def test_large_frames_are_reduced_while_they_are_converted():
    data = numbered_video(times_ms=(0, 100), width=1280, height=720)
    small = ImageTransform(size=80)
    assert small.reduction(1280, 720) == 8
    quick = decoded(data, num_frames=1, image=small).data.float()
    exact = decoded(data, num_frames=1, image=ImageTransform(size=80, jpeg_scaling=False)).data.float()
    assert (quick - exact).abs().mean() < 1.0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_pixels": WIDTH * HEIGHT - 1}, "exceeds the limit of 15359 a frame"),
        ({"max_seconds": 1.9}, "video of 2 s exceeds the limit of 1.9 s"),
        ({"max_packets": 39}, "more than 39 packets"),
    ],
)
def test_videos_over_a_limit_are_refused(limits, message):
    with pytest.raises(SampleError, match=message):
        decoded(numbered_video(), limits=MediaLimits(**limits))
    exact = {name: value + (0.1 if name == "max_seconds" else 1) for name, value in limits.items()}
    assert len(decoded(numbered_video(), limits=MediaLimits(**exact)).data) == 8


def test_a_clip_of_a_video_that_is_too_long_may_be_used():
    assert len(decoded(numbered_video(), limits=MediaLimits(max_seconds=1.0), start_s=0.5, end_s=1.0).data) == 8


INDEX_FIRST = {"index_first": True, "times_ms": tuple(range(0, 5000, 50))}


def test_a_cut_off_video_is_refused_or_used_as_far_as_it_goes():
    whole = numbered_video(**INDEX_FIRST)
    data = whole[: len(whole) * 6 // 10]
    assert probe("mp4", data).num_frames == 100
    with pytest.raises(SampleError, match="promises 100 frames and the file holds"):
        decoded(data)
    frames = decoded(data, partial="allow")
    assert numbers(frames) == sorted(numbers(frames))
    assert 1.5 < frames.times_s[-1] < 4.0
    frames = decoded(data, partial="allow", planned=probe("mp4", data), scheme="time_fps", fps=2.0)
    assert len(frames.data) == 10


def test_damaged_frames_are_refused_or_replaced_by_their_neighbours():
    whole = numbered_video(times_ms=INDEX_FIRST["times_ms"])
    data = flip_bits(whole[:-4000], 300, seed=1, first=2000) + whole[-4000:]
    with pytest.raises(SampleError, match=r"damaged video: \d+ packets cannot be decoded"):
        decoded(data, num_frames=16)
    frames = decoded(data, num_frames=16, partial="allow")
    assert len(frames.data) == 16
    assert 0 < frames.num_damaged <= 16


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty video file"),
        (bytes(range(256)) * 40, "unreadable video file"),
        (numbered_video()[:3000], "unreadable video file"),  # its index stood at the end
        (tone_file("mp3", "libmp3lame"), "without pictures"),
    ],
)
@pytest.mark.parametrize("partial", ["forbid", "allow"])
def test_files_without_any_frame_are_named(data, message, partial):
    with pytest.raises(SampleError, match=message):
        decoded(data, partial=partial)


def test_playlists_cannot_name_other_files(tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(numbered_video())
    for text in (f"#EXTM3U\n#EXTINF:1,\n{secret}\n", f"ffconcat version 1.0\nfile {secret}\n"):
        with pytest.raises(SampleError, match="unreadable"):
            decoded(text.encode())


def png(number):
    buffer = io.BytesIO()
    Image.fromarray(numbered_frame(number)).save(buffer, format="PNG")
    return "png", buffer.getvalue()


def test_stored_frames_are_all_used_or_chosen_by_their_times():
    data = join_frames([png(number) for number in range(10)])
    times = [number / 2 for number in range(10)]
    how = VideoTransform(image=IMAGE, sampling=FrameSampling(num_frames=4))
    assert numbers(how.stored(data)) == list(range(10))
    info = probe("mp4", numbered_video())
    chosen = how.stored(data, times, planned=info)
    assert numbers(chosen) == [1, 3, 6, 8]
    assert chosen.times_s == (0.5, 1.5, 3.0, 4.0)
    ten = VideoTransform(image=IMAGE, sampling=FrameSampling(num_frames=10))
    assert numbers(ten.stored(data, times, planned=info)) == list(range(10))


def test_the_frames_lie_channels_last_and_the_transform_travels():
    how = pickle.loads(pickle.dumps(VideoTransform(image=IMAGE)))
    data = how(numbered_video()).data
    assert data.shape == (8, 3, SIZE, SIZE)
    assert data.is_contiguous(memory_format=torch.channels_last)


def test_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    decoded(numbered_video())
    assert not list(tmp_path.iterdir())


def test_bit_flips_give_frames_or_a_sample_error_quickly():
    outcomes = set()
    for seed in range(40):
        data = flip_bits(numbered_video(container=("mp4", "matroska")[seed % 2]), 1 + seed, seed)
        start = time.perf_counter()
        try:
            outcomes.add(decoded(data, partial=("forbid", "allow")[seed // 2 % 2]).num_damaged > 0)
        except SampleError:
            outcomes.add("refused")
        assert time.perf_counter() - start < 5
    assert {"refused", False} <= outcomes


@pytest.mark.parametrize("limits", [{"max_pixels": 0}, {"max_seconds": 0.0}, {"max_packets": 0}])
def test_limits_must_be_positive(limits):
    with pytest.raises(ConfigError):
        MediaLimits(**limits)


def test_a_plain_decode_loop_sees_the_same_pixels():
    data = numbered_video(codec="libx264")
    with av.open(io.BytesIO(data)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    mine = every_frame(data).data
    expected = torch.stack([IMAGE.from_tensor(torch.from_numpy(np.array(p)).permute(2, 0, 1)) for p in plain])
    assert torch.equal(mine, expected)
