from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import jobs
from tests.distributed.processes import run_ranks


@pytest.mark.slow
def test_a_full_disk_of_one_rank_ends_all_and_leaves_what_was_saved(make_tree):
    tree = make_tree("run", save_every=1, keep_checkpoints=5, parallel={"strategy": "fsdp2"})
    found = run_ranks(2, jobs.train_with_trouble, tree, "full disk", 2)
    for result in found:
        assert "step-00000002" in result["error"]
        assert "No space left on device" in result["error"]
    folder = Path(tree["train"]["output_dir"]) / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    (first, _) = run_ranks(2, jobs.train_all, [(tree, {"resume": True})])
    assert first[0]["steps"] == 4


@pytest.mark.slow
def test_a_loss_of_one_rank_that_is_not_finite_leaves_the_step_out_on_all(make_tree):
    tree = make_tree("run", parallel={"strategy": "fsdp2"})
    found = run_ranks(2, jobs.train_with_trouble, tree, "not finite", 2)
    assert found == [{"bad_steps": 1}] * 2
    lines = [json.loads(line) for line in (Path(tree["train"]["output_dir"]) / "log.jsonl").read_text().splitlines()]
    (event,) = [line for line in lines if line.get("event") == "non_finite"]
    assert event["step"] == 2
    assert len(event["keys"]) >= 4, "samples of all ranks are named"
