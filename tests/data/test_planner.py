from __future__ import annotations

import tempfile
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis.strategies import booleans, builds, data, integers, just, lists, sampled_from

from llava_scale.data.cursor import Cursor
from llava_scale.data.lengths import TextLengths
from llava_scale.data.order import Order
from llava_scale.data.packing import CountPool, TokenPool
from llava_scale.data.planner import Planner, PlanRules, PlanState
from llava_scale.errors import ConfigError
from tests.data.streams import LetterEncoder, MemoryDataset, RampCounter

ROW = 40
CACHE = tempfile.TemporaryDirectory()
relaxed = settings(deadline=None, max_examples=40)
datasets = builds(
    MemoryDataset,
    lengths=lists(integers(-1, ROW + 5).filter(lambda n: n != 0), min_size=1, max_size=60),
    images=just([]),
    shard_size=integers(1, 30),
)


def make_planner(sources, *, rows_per_step=2, seed=0, weights=None, state=None, counter=None, part="train", **options):
    counter = counter or RampCounter()
    count_samples = options.get("samples_per_row")
    cursors = [
        Cursor(
            number,
            dataset,
            Order(len(dataset), seed + number, options.get("block", 4), options.get("window", 3)),
            None if count_samples else TextLengths(dataset, LetterEncoder(), cache_dir=CACHE.name),
            held_out=options.get("held_out", 0.0),
            part=part,
            limit=len(dataset) if part == "eval" else None,
        )
        for number, dataset in enumerate(sources)
    ]
    rules = PlanRules(
        rows_per_step=rows_per_step,
        row_length=None if count_samples else ROW,
        truncate=options.get("truncate", False),
        count=lambda info, step: counter.count(info, step=step).num_tokens,
        kinds=frozenset({"image"}),
        max_rejected=options.get("max_rejected", 7),
    )
    pool = CountPool(count_samples) if count_samples else TokenPool(ROW, options.get("lookahead", 3))
    if part == "train" and weights is None:
        weights = [1.0] * len(sources)
    return Planner(cursors, weights if part == "train" else None, pool, rules, state or PlanState.start(len(sources)))


def members(plans):
    rows = [row for plan in plans for row in plan.rows]
    return [(item.source, item.number) for row in rows for item in (*row.rejected, *row.samples)]


@relaxed
@given(dataset=datasets, rows=integers(1, 5), seed=integers(0, 99), lookahead=integers(1, 5))
def test_rows_use_every_sample_exactly_once_an_epoch(dataset, rows, seed, lookahead):
    planner = make_planner([dataset], rows_per_step=rows, seed=seed, lookahead=lookahead)
    plans = []
    for plan in planner.steps():
        plans.append(plan)
        if plan.positions[0] - len(plan.waiting) >= 3 * len(dataset):
            break
    used = members(plans)
    size = len(dataset)
    for epoch in range(3):
        assert sorted(used[epoch * size : (epoch + 1) * size]) == [(0, number) for number in range(size)]


@relaxed
@given(dataset=datasets, rows=integers(1, 5))
def test_no_row_overflows_and_every_unusable_sample_is_rejected(dataset, rows):
    plans = list(islice(make_planner([dataset], rows_per_step=rows).steps(), 30))
    for plan in plans:
        for row in plan.rows:
            assert sum(dataset.lengths[item.number] for item in row.samples) <= ROW
            assert all(not 0 < dataset.lengths[item.number] <= ROW for item in row.rejected)


@relaxed
@given(
    sources=lists(datasets, min_size=1, max_size=3),
    counter=sampled_from([RampCounter(), RampCounter(30, -3), RampCounter(2, 5)]),
    pictures=booleans(),
    cut=integers(1, 12),
    values=data(),
)
def test_planning_continues_exactly_from_any_step(sources, counter, pictures, cut, values):
    for dataset in sources:
        dataset.images = [number % 2 if pictures else 0 for number in range(len(dataset))]
        dataset.indexes.clear()
    weights = [values.draw(sampled_from([0.2, 1.0, 3.0])) for _ in sources]
    whole = list(islice(make_planner(sources, counter=counter, weights=weights).steps(), cut + 8))
    state = whole[cut - 1].state()
    resumed = list(islice(make_planner(sources, counter=counter, weights=weights, state=state).steps(), 8))
    assert [plan.rows for plan in resumed] == [plan.rows for plan in whole[cut:]]
    assert [plan.state() for plan in resumed] == [plan.state() for plan in whole[cut:]]


@relaxed
@given(sources=lists(datasets, min_size=2, max_size=4), values=data())
def test_every_prefix_of_the_mixture_follows_the_weights(sources, values):
    weights = [values.draw(integers(1, 9)) for _ in sources]
    for plan in islice(make_planner(sources, weights=weights).steps(), 20):
        drawn = sum(plan.counts)
        for count, weight in zip(plan.counts, weights, strict=True):
            assert abs(count - drawn * weight / sum(weights)) <= 1


@relaxed
@given(sources=lists(datasets, min_size=1, max_size=3), rows=integers(1, 4))
def test_evaluation_uses_every_sample_once_and_pads_the_last_step(sources, rows):
    plans = list(make_planner(sources, rows_per_step=rows, part="eval").steps())
    everything = [(source, number) for source, dataset in enumerate(sources) for number in range(len(dataset))]
    assert sorted(members(plans)) == everything
    assert all(len(plan.rows) == rows for plan in plans)
    assert all(row.step is None for plan in plans for row in plan.rows)


@relaxed
@given(dataset=datasets, share=sampled_from([0.1, 0.5, 0.9]))
def test_the_held_out_part_and_the_rest_make_the_whole(dataset, share):
    held_out = {number for _, number in members(make_planner([dataset], part="eval", held_out=share).steps())}
    if len(held_out) == len(dataset):
        with pytest.raises(ConfigError, match="holdout"):
            make_planner([dataset], held_out=share)
        return
    plans = make_planner([dataset], held_out=share).steps()
    rest: Counter[int] = Counter()
    for plan in plans:
        rest.update(number for _, number in members([plan]))
        if plan.positions[0] >= 2 * len(dataset):
            break
    assert set(rest) == set(range(len(dataset))) - held_out


def test_counts_are_those_of_the_step_that_uses_the_row():
    dataset = MemoryDataset(lengths=[2] * 50, images=[1] * 50)
    counter = RampCounter(start=18, change=-2)
    for plan in islice(make_planner([dataset], counter=counter, rows_per_step=1, lookahead=2).steps(), 8):
        length = 2 + counter.count(None, step=plan.step).num_tokens
        assert plan.rows[0].step == plan.step
        assert len(plan.rows[0].samples) == ROW // length


def test_the_work_of_a_step_does_not_grow_with_the_run():
    dataset = MemoryDataset(lengths=[2] * 900, images=[1] * 900, shard_size=1)
    calls = 0

    class Counting(RampCounter):
        def count(self, info, *, step):
            nonlocal calls
            calls += 1
            return super().count(info, step=step)

    planner = make_planner([dataset], counter=Counting(), rows_per_step=1, lookahead=2)
    done = [calls for _ in islice(planner.steps(), 120)]
    assert done[-1] - done[60] <= done[60] - done[0]


def test_a_sample_that_grows_beyond_the_row_is_rejected():
    dataset = MemoryDataset(lengths=[2] * 50, images=[1] * 50)
    plans = list(islice(make_planner([dataset], counter=RampCounter(20, 10), rows_per_step=1).steps(), 4))
    assert plans[0].rows[0].samples
    assert not plans[3].rows[0].samples
    assert plans[3].rows[0].rejected


def test_rows_of_unusable_samples_alone_are_given_out_so_that_the_run_can_stop():
    dataset = MemoryDataset(lengths=[-1] * 30)
    plan = next(make_planner([dataset], max_rejected=7).steps())
    assert [(len(row.samples), len(row.rejected)) for row in plan.rows] == [(0, 7), (0, 7)]


def test_rows_of_a_fixed_number_of_samples_need_no_lengths():
    dataset = MemoryDataset(lengths=[-1] * 10)
    dataset.turns = None  # would fail if it were read
    plans = list(islice(make_planner([dataset], samples_per_row=4, rows_per_step=1).steps(), 6))
    assert [len(plan.rows[0].samples) for plan in plans] == [4, 4, 2, 4, 4, 2]


def test_text_that_may_be_cut_is_planned_as_a_full_row_unless_media_fill_it():
    dataset = MemoryDataset(lengths=[ROW + 20, 5], images=[1, 1])
    plans = make_planner([dataset], truncate=True, rows_per_step=1).steps()
    assert {len(row.samples) for plan in islice(plans, 2) for row in plan.rows} == {1}
    full = make_planner([dataset], truncate=True, rows_per_step=1, counter=RampCounter(ROW))
    row = next(full.steps()).rows[0]
    assert not row.samples
    assert {item.number for item in row.rejected} == {0, 1}


def test_kinds_of_media_that_the_model_does_not_take_are_rejected():
    dataset = MemoryDataset(lengths=[5, 5], images=[1, 0])
    planner = make_planner([dataset], rows_per_step=1)
    planner._rules = PlanRules(
        rows_per_step=1,
        row_length=ROW,
        truncate=False,
        count=planner._rules.count,
        kinds=frozenset(),
        max_rejected=7,
    )
    row = next(planner.steps()).rows[0]
    assert [item.number for item in row.rejected] == [0]
