from __future__ import annotations

import io
import math
import pickle
import time

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_scale.data.audio import AudioTransform
from llava_scale.data.containers import MediaLimits
from llava_scale.data.media import probe
from llava_scale.errors import ConfigError, SampleError
from tests.data.media_files import flip_bits, numbered_video, pitch, sound_file, tone_file

FILES = {
    "wav": ("wav", "pcm_s16le", 16_000),
    "8-bit wav": ("wav", "pcm_u8", 8_000),
    "24-bit wav": ("wav", "pcm_s24le", 44_100),
    "float wav": ("wav", "pcm_f32le", 48_000),
    "mp3": ("mp3", "libmp3lame", 44_100),
    "flac": ("flac", "flac", 44_100),
    "opus": ("ogg", "libopus", 48_000),
    "m4a": ("ipod", "aac", 44_100),
}
EXTENSIONS = {"ipod": "m4a"}


def decoded(data, *, partial="forbid", limits=None, rate=16_000, **clip):
    return AudioTransform(sample_rate=rate, partial=partial, limits=limits or MediaLimits())(data, **clip)


def pitches(wave, seconds):
    """Pitch of the middle of each second."""
    return [pitch(wave[16_000 * k + 2_000 : 16_000 * k + 14_000]) for k in range(seconds)]


def sine(hertz, seconds, rate, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("channels", [1, 2])
def test_sounds_become_16_khz_with_the_right_pitch_at_the_right_second(name, channels):
    container, codec, rate = FILES[name]
    data = tone_file(container, codec, rate, gains=(1.0,) * channels)
    wave = decoded(data)
    assert wave.data.dtype == torch.float32
    assert wave.data.shape == (48_000,)
    assert wave.lost_s < 0.02
    assert pitches(wave.data, 3) == pytest.approx([500, 600, 700], abs=2)
    loudness = wave.data[20_000:28_000].square().mean().sqrt() * math.sqrt(2)
    assert 20 * math.log10(loudness / 0.5) == pytest.approx(0, abs=1.0 if name in ("m4a", "mp3", "opus") else 0.1)
    info = probe(EXTENSIONS.get(container, container), data)
    assert info.duration_s == pytest.approx(3.0, abs=0.05)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000])
def test_resampling_keeps_loudness_pitch_and_length(rate):
    wave = decoded(sound_file(sine(1_000, 1.0, rate)[None], rate=rate)).data
    assert len(wave) == 16_000
    middle = wave[4_000:12_000]
    assert pitch(middle) == pytest.approx(1_000, abs=2)
    assert 20 * math.log10(float(middle.square().mean().sqrt()) * math.sqrt(2) / 0.5) == pytest.approx(0, abs=0.1)
    expected = torch.from_numpy(sine(1_000, 1.0, 16_000))
    assert (middle - expected[4_000:12_000]).abs().max() < 0.02  # no shift in time either


def test_what_16_khz_cannot_hold_is_filtered_out():
    wave = decoded(sound_file(sine(11_000, 1.0, 44_100)[None], rate=44_100)).data
    assert wave[2_000:14_000].abs().max() < 0.005
    kept = decoded(sound_file(sine(7_000, 1.0, 44_100)[None], rate=44_100)).data
    assert kept[2_000:14_000].abs().max() > 0.45


@pytest.mark.parametrize(("gains", "expected"), [((1.0, 0.5), 0.75), ((1.0, -1.0), 0.0), ((1.0, 1.0), 1.0)])
def test_channels_are_averaged(gains, expected):
    mono = decoded(tone_file(gains=(1.0,))).data
    mixed = decoded(tone_file(gains=gains)).data
    torch.testing.assert_close(mixed, expected * mono, rtol=0, atol=1e-4)


def test_six_channels_are_averaged():
    gains = (1.0, 0.5, 0.0, 0.0, 0.0, 0.0)
    data = sound_file(np.stack([sine(500, 0.5, 16_000) * gain for gain in gains]))
    torch.testing.assert_close(decoded(data).data, 0.25 * torch.from_numpy(sine(500, 0.5, 16_000)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("start_s", "end_s"), [(0.0, 0.5), (0.7, 1.9), (2.6, 2.9), (2.2, None)])
def test_clips_are_the_samples_of_the_whole_sound(name, start_s, end_s):
    data = tone_file(*FILES[name])
    whole = decoded(data).data
    clip = decoded(data, start_s=start_s, end_s=end_s).data
    expected = whole[round(start_s * 16_000) : None if end_s is None else round(end_s * 16_000)]
    assert abs(len(clip) - len(expected)) <= 1
    number = min(len(clip), len(expected))
    # Lossy decoders settle to within their own noise after a seek; Ogg pages tell time to a millisecond or so.
    if name != "opus" or start_s < 2:
        torch.testing.assert_close(clip[:number], expected[:number], rtol=0, atol=0.02)
    else:
        assert pitch(clip) == pytest.approx(700, abs=10)


@given(start=st.floats(0, 2.5), length=st.floats(0.01, 0.4))
@settings(max_examples=30, deadline=None)
def test_any_clip_has_its_length(start, length):
    clip = decoded(tone_file("flac", "flac", 22_050), start_s=start, end_s=start + length).data
    assert abs(len(clip) - length * 16_000) <= 1


def test_a_clip_far_into_a_long_sound_is_sought():
    data = tone_file("mp3", "libmp3lame", 16_000, seconds=120.0)
    clip = decoded(data, start_s=100.0, end_s=101.0).data
    assert len(clip) == 16_000
    whole = decoded(data).data[1_600_000:1_616_000]
    torch.testing.assert_close(clip, whole, rtol=0, atol=0.02)


@pytest.mark.parametrize("container", ["mp4", "matroska", "mov"])
def test_a_video_has_its_own_sound_on_the_same_clock(container):
    data = numbered_video(container=container, sound="aac", times_ms=tuple(range(0, 3000, 50)))
    wave = decoded(data).data
    assert pitches(wave[: 16_000 * 3 - 800].tolist() + [0.0] * 800, 2) == pytest.approx([500, 600], abs=3)
    steps = [abs(pitch(wave[at - 1_600 : at]) - pitch(wave[at : at + 1_600])) for at in (16_000, 32_000)]
    assert all(step > 50 for step in steps)


def video_with_late_sound(start_s):
    """Two seconds of pictures, and one second of sound from ``start_s`` on."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        pictures = output.add_stream("libx264", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
        track = output.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for _ in range(20):
            output.mux(pictures.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        output.mux(pictures.encode())
        samples = (sine(500, 1.0, 16_000)[None] * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16_000, round(start_s * 16_000)
        output.mux(track.encode(frame))
        output.mux(track.encode())
    return buffer.getvalue()


def test_sound_that_begins_late_is_preceded_by_silence():
    wave = decoded(video_with_late_sound(0.5)).data
    assert int((wave.abs() > 0.01).nonzero()[0]) == pytest.approx(8_000, abs=80)  # 5 ms
    assert len(wave) == 24_000


def test_time_stamps_beyond_the_limit_are_refused_without_filling_memory():
    with pytest.raises(SampleError, match="more than 7200 s, the limit"):
        decoded(video_with_late_sound(10_000.0))


@pytest.mark.parametrize("planned", [47_000, 48_000, 50_000])
def test_as_many_samples_come_as_were_planned(planned):
    wave = decoded(tone_file(), num_samples=planned).data
    assert len(wave) == planned
    assert torch.equal(wave[:47_000], decoded(tone_file()).data[:47_000])
    assert not wave[48_000:].any()


def test_a_planned_length_from_the_header_is_the_decoded_one():
    for container, codec, rate in FILES.values():
        data = tone_file(container, codec, rate)
        duration_s = round(probe(EXTENSIONS.get(container, container), data).duration_s, 3)
        assert abs(round(duration_s * 16_000) - len(decoded(data).data)) <= 2_400


def test_very_short_sounds_are_kept_and_empty_ones_refused():
    assert len(decoded(tone_file(seconds=0.1)).data) == 1_600
    empty = tone_file(seconds=0.1)[:44]
    header = empty[:40] + b"\0\0\0\0"
    for data in (empty, header):
        with pytest.raises(SampleError, match=r"no samples|damaged|unreadable"):
            decoded(data)


def test_a_cut_off_sound_is_refused_or_used_as_far_as_it_goes():
    whole = tone_file("mp3", "libmp3lame", 22_050, seconds=5.0)
    data = whole[: len(whole) * 55 // 100]
    with pytest.raises(SampleError, match=r"damaged sound: 2\.\d+ s of 5\.00 s cannot be decoded"):
        decoded(data)
    wave = decoded(data, partial="allow")
    assert 2.4 < len(wave.data) / 16_000 < 3.0
    assert wave.lost_s == pytest.approx(5.0 - len(wave.data) / 16_000, abs=0.01)
    filled = decoded(data, partial="allow", num_samples=80_000).data
    assert torch.equal(filled[: len(wave.data)], wave.data)
    assert not filled[len(wave.data) :].any()


def test_damage_in_the_middle_leaves_the_rest_in_its_place():
    whole = tone_file("ipod", "aac", 44_100, seconds=5.0)
    third = len(whole) // 3
    data = whole[:third] + flip_bits(whole[third : 2 * third], 400, seed=0) + whole[2 * third :]
    with pytest.raises(SampleError, match="damaged sound"):
        decoded(data)
    wave = decoded(data, partial="allow")
    assert wave.lost_s > 0.15
    assert wave.data.isfinite().all()
    assert wave.data.abs().max() <= 1
    assert pitch(wave.data[2_000:12_000]) == pytest.approx(500, abs=3)
    assert pitch(wave.data[66_000:78_000]) == pytest.approx(900, abs=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty sound file"),
        (bytes(range(256)) * 40, "unreadable sound file"),
        (numbered_video(), "no sound track"),
    ],
)
def test_files_without_sound_are_named(data, message):
    with pytest.raises(SampleError, match=message):
        decoded(data)


def test_sounds_over_the_limit_are_refused_and_clips_of_them_are_not():
    limits = MediaLimits(max_seconds=1.0)
    with pytest.raises(SampleError, match="more than 1 s, the limit"):
        decoded(tone_file(), limits=limits)
    assert len(decoded(tone_file(), limits=limits, start_s=1.5, end_s=2.2).data) == 11_200


def test_clips_behind_the_end_are_refused():
    with pytest.raises(SampleError, match="no samples"):
        decoded(tone_file(), start_s=5.0)
    with pytest.raises(SampleError, match="not after its start"):
        decoded(tone_file(), start_s=1.0, end_s=0.5)


def test_bit_flips_give_sound_or_a_sample_error_quickly():
    refused = fine = 0
    for seed in range(40):
        name = list(FILES)[seed % len(FILES)]
        data = flip_bits(tone_file(*FILES[name]), 1 + seed * 5, seed)
        start = time.perf_counter()
        try:
            wave = decoded(data, partial=("forbid", "allow")[seed // 8 % 2]).data
            assert wave.isfinite().all()
            assert wave.abs().max() <= 1
            fine += 1
        except SampleError:
            refused += 1
        assert time.perf_counter() - start < 5
    assert fine
    assert refused


def test_the_transform_travels_and_checks_its_rate():
    assert pickle.loads(pickle.dumps(AudioTransform(partial="allow"))) == AudioTransform(partial="allow")
    with pytest.raises(ConfigError):
        AudioTransform(sample_rate=0)
    assert len(decoded(tone_file(), rate=48_000).data) == 144_000
