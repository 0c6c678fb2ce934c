from __future__ import annotations

import pytest
import torch

from llava_scale.compressors.schedule import RAMP_MULTIPLE, RatioSchedule, merge_ratio, random_integers
from tests.compressors import golden


def test_the_cosine_ramp_is_the_originals():
    arrays = golden.load("seed_cosine_schedule")
    for name, final in (("r_max25", 0.25), ("r_max50", 0.5), ("r_max75", 0.75)):
        ratios = [merge_ratio(int(step), final=final, warmup_steps=4000) for step in arrays["ticks"]]
        golden.assert_same(torch.tensor(ratios, dtype=torch.float64), arrays[name])


@pytest.mark.parametrize("ramp", ["cosine", "linear"])
def test_ramps_rise_from_zero_to_the_final_ratio(ramp):
    ratios = [merge_ratio(step, final=0.5, warmup_steps=10, ramp=ramp) for step in range(12)]
    assert ratios[0] == 0
    assert ratios == sorted(ratios)
    assert ratios[10:] == [0.5, 0.5]
    assert merge_ratio(None, final=0.5, warmup_steps=10, ramp=ramp) == 0.5


def test_without_a_ramp_the_ratio_is_final_from_the_first_step():
    assert merge_ratio(0, final=0.5, warmup_steps=10, ramp="constant") == 0.5
    assert merge_ratio(0, final=0.5, warmup_steps=0) == 0.5


def test_after_the_ramp_exactly_the_share_is_removed():
    assert RatioSchedule(final=0.29).num_kept(100, 0) == 71  # 0.29 * 100 is a little below 29 in floating point
    assert RatioSchedule(final=0.5).num_kept(63, None) == 32
    assert RatioSchedule(final=0.9).num_kept(16, None, least=4) == 4


def test_on_the_ramp_there_are_few_different_lengths_and_never_fewer_tokens_than_after_it():
    schedule = RatioSchedule(final=0.5, warmup_steps=4000)
    counts = [schedule.num_kept(577, step) for step in range(4001)]
    assert counts[0] == 577
    assert counts[4000] == schedule.num_kept(577, None) == 289
    assert counts == sorted(counts, reverse=True)
    assert all(count % RAMP_MULTIPLE == 0 for count in set(counts) - {577, 289})
    assert len(set(counts)) <= 577 // 2 // RAMP_MULTIPLE + 3


def test_random_integers_are_fixed_by_step_and_place_and_spread_evenly():
    device = torch.device("cpu")
    drawn = random_integers(7, 4096, device=device)
    assert torch.equal(drawn, random_integers(7, 4096, device=device))
    assert torch.equal(drawn[:100], random_integers(7, 100, device=device))
    assert not torch.equal(drawn, random_integers(8, 4096, device=device))
    for count in (4, 9):
        shares = torch.bincount(drawn % count, minlength=count) / 4096
        assert (shares - 1 / count).abs().max() < 0.02
    pairs = torch.bincount(drawn[:-1] % 4 * 4 + drawn[1:] % 4, minlength=16) / 4095
    assert (pairs - 1 / 16).abs().max() < 0.015
    steps = torch.stack([random_integers(step, 64, device=device) % 4 for step in range(200)])
    assert ((steps == 0).float().mean(0) - 0.25).abs().max() < 0.13
