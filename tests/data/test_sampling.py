from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_scale.data.sampling import (
    FrameSampling,
    llava_next_indices,
    middles,
    segment_indices,
    shown_at,
    transformers_indices,
    uniform_indices,
    videollama2_indices,
    videollama2_range,
)
from llava_scale.errors import ConfigError, SampleError
from llava_scale.types import MediaInfo

TABLES = json.loads((Path(__file__).parent / "audio" / "frame_indices.json").read_text())
SCHEMES = ["time", "time_fps", "uniform", "fps", "videollama2", "videollama2_fps", "llava_next", "transformers_fps"]


def rows(table):
    """(numbers of the key, official result) of a table that has any."""
    found = [(tuple(map(float, key.split(","))), value) for key, value in TABLES[table].items()]
    assert len(found) > 30
    return found


def constant_rate(num_frames, rate):
    return [i / rate for i in range(num_frames)], num_frames / rate


def sampled(length, rate, **how):
    return FrameSampling(**how).indices(*constant_rate(length, rate))


def test_uniform_indices_are_the_originals_with_its_cap():
    for (n, number), expected in rows("seed_uniform"):
        assert sampled(int(n), 25.0, scheme="uniform", num_frames=int(number)) == expected
        assert len(uniform_indices(int(n), int(number))) == number


def test_indices_by_rate_are_the_originals_with_its_cap():
    for (n, rate), expected in rows("seed_fps"):
        chosen = segment_indices(int(n), rate, 1.0)
        assert chosen == expected or len(chosen) > 32
        assert sampled(int(n), rate, scheme="fps") == expected


def test_uniform_indices_are_videollama2s():
    for (n, number), expected in rows("vl2_uniform"):
        assert videollama2_indices(int(n), int(number)) == expected


def test_indices_by_rate_are_videollama2s_but_never_lose_the_end():
    capped = 0
    for (n, rate), expected in rows("vl2_fps"):
        assert segment_indices(int(n), rate, 1.0) == expected["decoded"]
        mine = sampled(int(n), rate, scheme="videollama2_fps")
        if expected["used"] < len(expected["decoded"]):
            capped += 1
            assert len(mine) == expected["used"]
            assert mine[-1] == n - 1
        else:
            assert mine == expected["decoded"]
    assert capped


def test_clips_are_videollama2s():
    for (n, rate, start, end, number), expected in rows("vl2_clip_s_e"):
        frames = videollama2_range(int(n), rate, start, end)
        assert [frames[i] for i in videollama2_indices(len(frames), int(number))] == expected


def test_indices_are_llava_nexts():
    for (n, rate, fps, upper, always), expected in rows("llava_next_decord"):
        chosen = llava_next_indices(int(n), rate, fps, upper=int(upper), always=bool(always))
        assert chosen == expected["idx"]


def test_indices_are_those_of_transformers_and_its_refusals_are_ours():
    refused = 0
    for (n, number), expected in rows("hf_num_frames"):
        if expected == "ValueError":
            refused += 1
            with pytest.raises(SampleError, match="fewer than"):
                transformers_indices(int(n), int(number))
        else:
            assert transformers_indices(int(n), int(number)) == expected
    assert refused
    for (n, rate, fps), expected in rows("hf_fps"):
        assert sampled(int(n), rate, scheme="transformers_fps", fps=fps, max_frames=10_000) == expected


def test_a_video_below_one_frame_a_second_counts_every_frame():
    assert TABLES["errors"]["seed_fps 0.5 fps source, n=10"] == "ZeroDivisionError"
    assert sampled(10, 0.5, scheme="fps") == list(range(10))
    assert sampled(10, 0.4, scheme="llava_next") == list(range(10))


@pytest.mark.parametrize("scheme", SCHEMES)
@given(n=st.integers(1, 2_000), rate=st.floats(0.2, 120), number=st.integers(1, 64), fps=st.floats(0.1, 30))
def test_every_scheme_keeps_to_the_cap_the_order_and_the_count_it_promised(scheme, n, rate, number, fps):
    how = FrameSampling(scheme=scheme, num_frames=number, fps=fps, max_frames=24)
    times, end = constant_rate(n, rate)
    if scheme == "transformers_fps" and fps > rate:
        return  # it refuses to show frames twice
    chosen = how.indices(times, end)
    assert 1 <= len(chosen) <= 24
    assert chosen == sorted(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < n
    assert len(chosen) == how.num_sampled(num_frames=n, duration_s=end - times[0])


def test_sampling_by_time_sees_a_pause_as_long_as_it_lasts():
    times = [0.0, 0.1, 0.2, 0.3, 8.0, 8.1]
    assert FrameSampling(num_frames=8).indices(times, 8.2) == [3, 3, 3, 3, 3, 3, 3, 3]
    assert FrameSampling(scheme="uniform", num_frames=4).indices(times, 8.2) == [0, 1, 3, 4]


def test_a_late_start_shifts_the_instants():
    times = [1.5 + i / 10 for i in range(20)]
    assert FrameSampling(num_frames=4).indices(times, 3.5) == [2, 7, 12, 17]


def test_frames_by_time_take_the_planned_number_even_if_the_file_is_shorter():
    times, end = constant_rate(25, 25.0)
    how = FrameSampling(scheme="time_fps", fps=2.0)
    assert how.num_sampled(num_frames=100, duration_s=4.0) == 8
    assert len(how.indices(times, end, MediaInfo(kind="video", num_frames=100, duration_s=4.0))) == 8
    assert len(how.indices(times, end)) == 2


@pytest.mark.parametrize("scheme", SCHEMES)
@given(n=st.integers(1, 2_000), rate=st.sampled_from([10.0, 12.5, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 60.0]))
def test_durations_to_the_millisecond_promise_the_right_number(scheme, n, rate):
    how = FrameSampling(scheme=scheme, fps=1.0, num_frames=min(n, 8))
    times, end = constant_rate(n, rate)
    planned = MediaInfo(kind="video", num_frames=n, duration_s=round(end, 3))
    promised = how.num_sampled(num_frames=n, duration_s=planned.duration_s)
    assert len(how.indices(times, end, planned)) == promised
    if scheme != "time_fps":
        assert how.indices(times, end, planned) == how.indices(times, end)


def test_indices_refuse_another_number_of_frames_than_planned():
    planned = MediaInfo(kind="video", num_frames=100, duration_s=4.0)
    with pytest.raises(SampleError, match="2 of 50 frames where 4 of 100 were planned"):
        FrameSampling(scheme="fps").indices(*constant_rate(50, 25.0), planned)


def test_instants_before_the_first_frame_show_the_first():
    assert shown_at([0.0, 0.99, 1.0, 5.0], [1.0, 2.0]) == [0, 0, 0, 1]
    assert middles(1.0, 3.0, 2) == [1.5, 2.5]


def test_videos_without_frames_or_duration_are_refused():
    with pytest.raises(SampleError, match="no frames"):
        FrameSampling().indices([], 1.0)
    with pytest.raises(SampleError, match="unknown"):
        FrameSampling(scheme="time_fps").num_sampled(num_frames=10, duration_s=0.0)
    with pytest.raises(SampleError, match="unknown"):
        FrameSampling(scheme="uniform").num_sampled(num_frames=0, duration_s=1.0)


@pytest.mark.parametrize("how", [{"scheme": "unifrom"}, {"num_frames": 0}, {"fps": 0.0}, {"max_frames": 0}])
def test_impossible_sampling_is_refused(how):
    with pytest.raises(ConfigError):
        FrameSampling(**how)
