from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import booleans, integers

from llava_scale.data.order import Order, mix, permute
from llava_scale.errors import ConfigError

relaxed = settings(deadline=None, max_examples=60)
SIZES = {"n": integers(1, 400), "block": integers(1, 40), "window": integers(1, 9), "seed": integers(0, 2**63)}


@relaxed
@given(**SIZES, epoch=integers(0, 5), shuffle=booleans())
def test_every_sample_comes_exactly_once_an_epoch(n, block, window, seed, epoch, shuffle):
    order = Order(n, seed, block, window, shuffle)
    numbers = order.samples(epoch * n, (epoch + 1) * n)
    assert sorted(numbers.tolist()) == list(range(n))


@relaxed
@given(**SIZES, start=integers(0, 150), length=integers(0, 150))
def test_any_slice_is_a_slice_of_the_same_sequence(n, block, window, seed, start, length):
    order = Order(n, seed, block, window)
    whole = order.samples(0, start + length)
    assert order.samples(start, start + length).tolist() == whole[start:].tolist()


@relaxed
@given(**SIZES, position=integers(0, 2000))
def test_a_window_holds_its_position_and_stays_inside_one_epoch(n, block, window, seed, position):
    start, numbers = Order(n, seed, block, window).window(position)
    assert start <= position < start + len(numbers)
    assert start // n == (start + len(numbers) - 1) // n


@relaxed
@given(size=integers(1, 5000), key=integers(0, 2**64 - 1))
def test_permute_is_a_permutation_and_needs_no_neighbours(size, key):
    everything = permute(np.arange(size), size, key)
    assert sorted(everything.tolist()) == list(range(size))
    assert permute(np.array([size // 2]), size, key).tolist() == [everything[size // 2]]


def test_without_shuffling_samples_come_in_the_order_of_the_shards():
    assert Order(5, shuffle=False).samples(3, 12).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_epochs_and_seeds_give_different_orders():
    order = Order(1000, seed=1)
    first, second = order.samples(0, 1000), order.samples(1000, 2000)
    assert (first != second).mean() > 0.9
    assert (first != Order(1000, seed=2).samples(0, 1000)).mean() > 0.9


def test_the_order_of_a_seed_never_changes():
    """Resuming with a later release must find the same sequence."""
    assert mix(1, 2, 3) == 7702586659592502839
    assert Order(1000, 7, 8, 4).samples(0, 6).tolist() == [604, 831, 606, 207, 96, 98]
    far = Order(10**8, 7, 64, 16).samples(123_456_789, 123_456_793)
    assert far.tolist() == [98641872, 89021117, 69003649, 40609601]


def test_neighbours_are_fetched_together_but_not_in_order():
    numbers = Order(100_000, seed=3, block_size=64, window_blocks=16).samples(0, 1024)
    assert len(np.unique(numbers // 64)) <= 32
    assert (np.diff(numbers) == 1).mean() < 0.02


def test_shuffling_spreads_samples_over_the_whole_epoch():
    size = 50_000
    numbers = Order(size, seed=5).samples(0, size)
    moved = np.abs(numbers - np.arange(size)).mean() / size
    assert moved == pytest.approx(1 / 3, abs=0.02)  # as in a uniform permutation
    assert abs(np.corrcoef(numbers, np.arange(size))[0, 1]) < 0.1


def test_a_hundred_million_samples_cost_nothing_to_start_with():
    order = Order(10**8, seed=1)
    start, numbers = order.window(99_999_999)
    assert start + len(numbers) == 10**8
    assert numbers.max() < 10**8


@pytest.mark.parametrize("sizes", [(0, 4, 4), (4, 0, 4), (4, 4, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ConfigError, match="at least 1"):
        Order(sizes[0], 0, sizes[1], sizes[2])
