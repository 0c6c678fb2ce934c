from __future__ import annotations

import json

import pytest

from llava_scale.data.budget import CHECKED_FROM, ErrorBudget
from llava_scale.data.collate import Outcome
from llava_scale.errors import SampleError
from llava_scale.types import SkippedSample

GOOD = Outcome(0)


def bad(key: str) -> Outcome:
    return Outcome(0, SkippedSample(shard="s.tar", key=key, reason="damaged"))


def test_a_share_beyond_the_limit_stops_the_run_and_names_the_sample():
    budget = ErrorBudget(0.01, 100)
    budget.count([bad("early")] * 50 + [GOOD] * (CHECKED_FROM - 51), step=0)
    with pytest.raises(SampleError, match=r"s\.tar: sample 'late'.*51 of 1000.*max_bad_fraction"):
        budget.count([bad("late")], step=1)


def test_a_share_within_the_limit_goes_on():
    budget = ErrorBudget(0.01, 100)
    for step in range(100):
        budget.count([GOOD] * 99 + [bad(str(step))], step)


def test_bad_samples_in_a_row_stop_the_run_at_once():
    budget = ErrorBudget(0.5, 3)
    budget.count([bad("a"), bad("b"), GOOD], step=0)
    with pytest.raises(SampleError, match=r"'e'.*3 samples in a row"):
        budget.count([bad("c"), bad("d"), bad("e")], step=1)


def test_every_bad_sample_is_listed_even_those_that_stop_the_run(tmp_path):
    log = tmp_path / "run" / "skipped.jsonl"
    budget = ErrorBudget(0.5, 2, log)
    budget.count([bad("a/ü"), GOOD], step=3)
    with pytest.raises(SampleError, match=r"skipped\.jsonl"):
        budget.count([bad("b"), bad("c\ud800")], step=4)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["step"], line["shard"], line["key"], line["reason"]) for line in lines] == [
        (3, "s.tar", "a/ü", "damaged"),
        (4, "s.tar", "b", "damaged"),
        (4, "s.tar", "c\ud800", "damaged"),
    ]
