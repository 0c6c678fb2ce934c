from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_scale.errors import ConfigError, ShapeError
from llava_scale.towers.fbank import Fbank
from tests.towers.loudness import assert_same_loudness

GOLDEN = np.load(Path(__file__).parent.parent / "data" / "audio" / "fbank_edge.npz")
CASES = sorted({name.partition("__")[0] for name in GOLDEN.files})


def wave_of(case):
    return torch.from_numpy(GOLDEN[f"{case}__wave_i16"].astype(np.float32) / 32768)


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5


@pytest.mark.parametrize("case", CASES)
def test_filter_banks_equal_kaldis(case):
    assert_same_loudness(Fbank()(wave_of(case)), torch.from_numpy(GOLDEN[f"{case}__fbank"]))


@pytest.mark.parametrize("case", CASES)
def test_float64_sounds_are_computed_in_float64(case):
    bank = Fbank()(wave_of(case).double())
    assert bank.dtype == torch.float64
    assert_same_loudness(bank, torch.from_numpy(GOLDEN[f"{case}__fbank_f64"]).double(), share=1e-9)


def test_a_batch_equals_its_sounds_alone():
    waves = noise(2, 3, 5_000)
    batch = Fbank()(waves)
    assert batch.shape == (2, 3, Fbank().num_frames(5_000), 128)
    for row in range(2):
        for col in range(3):
            torch.testing.assert_close(batch[row, col], Fbank()(waves[row, col]), rtol=0, atol=1e-5)


def test_a_long_sound_equals_its_parts():
    wave = noise(16_000 * 60)
    whole = Fbank()(wave)
    assert len(whole) == 5998
    start = 4_500
    torch.testing.assert_close(whole[start:], Fbank()(wave[160 * start :]), rtol=0, atol=1e-5)


def test_sixteen_bit_sounds_and_autocast_do_not_overflow():
    wave = noise(16_000)
    expected = Fbank()(wave)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = Fbank()(wave)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, expected)
    half = Fbank()(wave.half())
    assert half.dtype == torch.float32
    assert (half - expected).abs().mean() < 0.1


@pytest.mark.parametrize(("num_samples", "num_frames"), [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (2_800, 16)])
def test_frames_lie_wholly_inside_the_sound(num_samples, num_frames):
    assert Fbank().num_frames(num_samples) == num_frames
    if num_frames:
        assert len(Fbank()(noise(num_samples))) == num_frames


def test_a_tone_is_loudest_in_the_filter_around_it():
    time = torch.arange(16_000) / 16_000
    loudest = [int(Fbank()(torch.sin(2 * torch.pi * hz * time)).mean(0).argmax()) for hz in (300, 1_000, 3_000, 7_000)]
    assert loudest == sorted(set(loudest))


def test_sounds_shorter_than_a_frame_are_refused():
    with pytest.raises(ShapeError, match="400 samples or more, got 399"):
        Fbank()(noise(399))


@pytest.mark.parametrize("settings", [{"num_bins": 0}, {"low_hz": 9_000.0}, {"high_hz": 9_000.0}, {"shift_ms": 0.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        Fbank(**settings)


def test_filter_banks_travel_to_workers():
    assert pickle.loads(pickle.dumps(Fbank(num_bins=64))) == Fbank(num_bins=64)
