from __future__ import annotations

import pytest
import torch

from llava_scale.compressors import build_weightless
from llava_scale.compressors.base import Context
from llava_scale.compressors.legacy_dropping import LegacyDropping
from llava_scale.compressors.schedule import RatioSchedule
from llava_scale.config.compressor import TokenMergingConfig
from tests.compressors import golden

ORIGINAL = golden.cases("seed_local_token_merging")


def dropping(ratio=0.5, **settings):
    return LegacyDropping(schedule=RatioSchedule(final=ratio, **settings))


@pytest.mark.parametrize("case", ORIGINAL, ids=lambda case: f"{case['x'].shape[1]}")
def test_what_stays_is_what_the_original_kept(case):
    stride = int(case["stride"])
    module = LegacyDropping(schedule=RatioSchedule(final=float(case["ratio"])), window=(1, stride, stride))
    out = module(case["x"], (1, *case["grid_hw"].tolist()), offsets=case["rand_offset"])
    golden.assert_same(out.positions, case["seed_kept_index"])
    golden.assert_same(out.tokens, case["seed_out"])


def test_counts_follow_the_ramp_without_rounding():
    module = dropping(warmup_steps=4000)
    counts = [module.num_tokens((1, 16, 16), step) for step in (0, 1000, 2000, 3999, 4000, None)]
    assert counts == [256, 247, 219, 129, 128, 128]
    assert module.num_tokens((3, 16, 16), None) == 3 * 128
    assert dropping(0.9).num_tokens((1, 4, 4), None) == 4  # destinations cannot go


def test_nothing_before_it_learns_once_tokens_are_dropped():
    x = torch.randn(1, 16, 4, requires_grad=True)
    dropping()(x, (1, 4, 4), Context(step=9)).tokens.sum().backward()
    assert not x.grad.any()
    dropping(warmup_steps=100)(x, (1, 4, 4), Context(step=0)).tokens.sum().backward()
    assert (x.grad == 1).all()


def test_the_last_quarter_of_a_picture_is_never_dropped():
    out = dropping(0.75)(torch.randn(2, 64, 4), (1, 8, 8))
    assert (out.positions[:, -16:] == torch.arange(48, 64)).all()


def test_frames_are_pictures_of_their_own():
    x = torch.randn(2, 32, 4)
    both = dropping()(x, (2, 4, 4), Context(step=5))
    first = dropping()(x[:, :16], (1, 4, 4), Context(step=5))
    second = dropping()(x[:, 16:], (1, 4, 4), Context(step=5))
    assert torch.equal(both.tokens, torch.cat([first.tokens, second.tokens], dim=1))
    assert torch.equal(both.positions, torch.cat([first.positions, second.positions + 16], dim=1))


def test_the_config_chooses_it():
    config = TokenMergingConfig(type="token_merging", legacy=True, after_projector=True, ratio=0.25)
    assert isinstance(build_weightless(config), LegacyDropping)
