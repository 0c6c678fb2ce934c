from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists

from llava_scale.data.mixing import Mixture
from llava_scale.errors import ConfigError


@settings(deadline=None, max_examples=60)
@given(weights=lists(floats(0.001, 1000.0), min_size=1, max_size=12), num_draws=integers(1, 400))
def test_every_prefix_is_within_one_of_the_weights(weights, num_draws):
    mixture = Mixture(weights)
    total = sum(weights)
    for drawn in range(1, num_draws + 1):
        mixture.draw()
        assert all(
            abs(count - drawn * weight / total) <= 1 + 1e-9
            for count, weight in zip(mixture.counts, weights, strict=True)
        )
    assert sum(mixture.counts) == num_draws


@settings(deadline=None, max_examples=60)
@given(weights=lists(floats(0.01, 100.0), min_size=1, max_size=6), cut=integers(0, 200))
def test_the_counts_are_the_whole_state(weights, cut):
    mixture = Mixture(weights)
    for _ in range(cut):
        mixture.draw()
    resumed = Mixture(weights, mixture.counts)
    assert [resumed.draw() for _ in range(50)] == [mixture.draw() for _ in range(50)]


def test_equal_weights_take_turns():
    mixture = Mixture([2.0, 2.0])
    assert [mixture.draw() for _ in range(4)] in ([0, 1, 0, 1], [0, 1, 1, 0])


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0]])
def test_weights_that_are_not_positive_are_refused(weights):
    with pytest.raises(ConfigError, match="positive"):
        Mixture(weights)
