from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, lists

from llava_scale.data.cursor import Draw
from llava_scale.data.packing import CountPool, TokenPool


def draw(number: int, length: int) -> Draw:
    return Draw(0, number, number, length, ())


def rows_of(lengths: list[int], row_length: int, lookahead_rows: int = 32) -> list[list[Draw]]:
    pool = TokenPool(row_length, lookahead_rows)
    rows = []
    for number, length in enumerate(lengths):
        pool.add(draw(number, length), length)
        if pool.ready():
            rows.append(pool.take())
    while row := pool.take():
        rows.append(row)
    return rows


def fill(rows: list[list[Draw]], row_length: int) -> float:
    return sum(item.text_length for row in rows for item in row) / (len(rows) * row_length)


@settings(deadline=None, max_examples=80)
@given(lengths=lists(integers(1, 50), max_size=120), lookahead=integers(1, 6))
def test_every_sample_gets_one_place_and_no_row_overflows(lengths, lookahead):
    rows = rows_of(lengths, 50, lookahead)
    assert sorted(item.number for row in rows for item in row) == list(range(len(lengths)))
    assert all(0 < sum(item.text_length for item in row) <= 50 for row in rows)
    assert all([item.number for item in row] == sorted(item.number for item in row) for row in rows)


@settings(deadline=None, max_examples=60)
@given(lengths=lists(integers(1, 50), min_size=30, max_size=120), cut=integers(0, 8))
def test_a_pool_refilled_with_what_waits_goes_on_alike(lengths, cut):
    pool, copy = TokenPool(50, 4), TokenPool(50, 4)
    for number, length in enumerate(lengths):
        pool.add(draw(number, length), length)
    for _ in range(cut):
        pool.take()
    for item in pool.draws():
        copy.add(item, item.text_length)
    while row := pool.take():
        assert copy.take() == row
    assert not copy.take()


def test_the_oldest_sample_enters_the_next_row():
    lengths = [random.Random(1).randint(5, 40) for _ in range(400)]
    seen: set[int] = set()
    for row in rows_of(lengths, 50):
        assert min(set(range(400)) - seen) == row[0].number
        seen |= {item.number for item in row}


MIXES = {
    "captions of 144 visual tokens": lambda rng: 144 + int(rng.lognormvariate(2.6, 0.5)),
    "captions of 64 visual tokens": lambda rng: 64 + int(rng.lognormvariate(2.6, 0.5)),
    "instructions with and without pictures": lambda rng: (
        rng.choice([0, 576, 576, 576]) + 1 + min(1400, int(rng.lognormvariate(5, 0.9)))
    ),
    "text": lambda rng: 1 + int(rng.lognormvariate(3, 0.8)),
}


@pytest.mark.parametrize("row_length", [2048, 4096])
@pytest.mark.parametrize("mix", MIXES)
def test_rows_are_at_least_98_percent_full(mix, row_length):
    rng = random.Random(0)
    rows = rows_of([MIXES[mix](rng) for _ in range(6000)], row_length)
    assert fill(rows[:-1], row_length) >= 0.98


def test_remeasuring_keeps_the_order_of_arrival_and_returns_what_no_longer_fits():
    pool = TokenPool(50, 4)
    for number in range(10):
        pool.add(draw(number, 20), 20)
    gone = pool.remeasure(lambda item: None if item.number == 3 else 10)
    assert [item.number for item in gone] == [3]
    assert [item.number for item in pool.draws()] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert len(pool.take()) == 5


def test_a_row_may_hold_a_fixed_number_of_samples():
    pool = CountPool(3)
    for number in range(4):
        assert pool.ready() == (number >= 3)
        pool.add(draw(number, 1), 1)
    assert [[item.number for item in pool.take()] for _ in range(3)] == [[0, 1, 2], [3], []]
