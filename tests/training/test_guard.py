from __future__ import annotations

import pytest
import torch

from llava_scale.errors import TrainingError
from llava_scale.training.guard import FiniteGuard


def feed(guard: FiniteGuard, outcomes: str, first: int = 1) -> list[int]:
    bad = []
    for step, outcome in enumerate(outcomes, start=first):
        guard.watch(step, (f"k{step}",), torch.tensor(outcome == "."))
        bad += [item.step for item in guard.settle(keep=0)]
    return bad


def test_bad_steps_are_counted_and_a_good_one_ends_their_row():
    guard = FiniteGuard(3)
    assert feed(guard, ".xx.xx.") == [2, 3, 5, 6]
    assert (guard.num_bad, guard.num_in_a_row) == (4, 0)


def test_too_many_in_a_row_are_fatal_and_name_the_samples():
    with pytest.raises(TrainingError, match=r"3 steps in a row \(up to step 4\).*k4"):
        feed(FiniteGuard(3), ".xxx")


def test_the_newest_steps_may_wait_for_their_verdict():
    guard = FiniteGuard(3)
    guard.watch(1, ("a",), torch.tensor(False))
    assert guard.settle(keep=1) == []
    assert [item.keys for item in guard.settle(keep=0)] == [("a",)]


def test_the_row_of_bad_steps_goes_on_after_a_restart():
    guard = FiniteGuard(3)
    feed(guard, "xx")
    resumed = FiniteGuard(3)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(TrainingError):
        feed(resumed, "x", first=3)


def test_only_the_first_keys_of_a_long_step_are_shown():
    guard = FiniteGuard(1)
    guard.watch(1, tuple(f"key{i}" for i in range(50)), torch.tensor(False))
    with pytest.raises(TrainingError, match="key19 and 30 more"):
        guard.settle(keep=0)
