from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.distributed import jobs
from tests.distributed.processes import run_ranks, start_ranks

STEPS = 6


def kill(tree, moment, victims, draw):
    """Start two ranks, kill some of them with SIGKILL at ``moment``, and soon the others, as torchrun does.

    Returns whether they were still at work.
    """
    folder = Path(tree["train"]["output_dir"])
    before, leftover = log_size(folder), unfinished(folder)
    processes, _ = start_ranks(2, jobs.train_all, [(tree, {"resume": True})])
    deadline = time.monotonic() + 60
    while all(process.is_alive() for process in processes) and time.monotonic() < deadline:
        begun = unfinished(folder) - leftover
        if begun if moment == "in a checkpoint" else log_size(folder) > before:
            break
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.01 if moment == "in a checkpoint" else 0.3))
    at_work = all(process.is_alive() for process in processes)
    for rank in victims:
        processes[rank].kill()
    for process in processes:
        process.join(5)
        process.kill()
        process.join(10)
    return at_work


def unfinished(folder):
    """Checkpoints that are being written or were left so."""
    return {path.stat().st_ino for path in (folder / "checkpoints").glob(".step-*.partial") if path.exists()}


def log_size(folder):
    path = folder / "log.jsonl"
    return path.stat().st_size if path.exists() else 0


def check_kills(make_tree, rounds):
    settings = {"steps": STEPS, "rows_per_step": 2, "save_every": 2, "parallel": {"strategy": "fsdp2"}}
    whole = make_tree("whole", **settings)
    run_ranks(2, jobs.train_all, [(whole, {})])
    expected = jobs.trained_lines(whole)
    draw, hits = random.Random(0), 0
    tree = make_tree("killed", async_checkpoint=True, **settings)
    for number, (moment, victims) in enumerate(rounds):
        tree["train"]["async_checkpoint"] = number % 2 == 0
        hits += kill(tree, moment, victims, draw)
        done = jobs.trained_lines(tree)
        assert done == expected[: len(done)]
        if len(done) == STEPS:
            tree = make_tree(f"killed{number}", **settings)
    run_ranks(2, jobs.train_all, [(tree, {"resume": True})])
    assert jobs.trained_lines(tree) == expected
    return hits


def test_a_run_whose_ranks_are_killed_ends_as_if_they_never_were(make_tree):
    assert check_kills(make_tree, [("in a checkpoint", (0, 1)), ("in training", (1,))])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("moment", ["in training", "in a checkpoint"])
def test_twenty_rounds_of_kills_of_each_kind_lose_nothing(make_tree, moment, victims):
    assert check_kills(make_tree, [(moment, victims)] * 20) >= 10
