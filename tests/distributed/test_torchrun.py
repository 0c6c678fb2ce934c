from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.distributed import jobs

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [str(Path(sys.executable).with_name("llava-scale")), "train"]


def torchrun(size=2, *options):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--standalone"]
    return [*start, *options, "--no-python", *COMMAND]


def launch(*arguments: object, size: int = 2) -> subprocess.CompletedProcess[str]:
    command = [*torchrun(size), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_trains_and_only_one_process_talks(make_tree, tmp_path):
    tree = make_tree("run", steps=2, parallel={"strategy": "fsdp2"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    done = launch(recipe)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("over 2 processes (fsdp2)") == 1
    assert done.stdout.count("2 of 2 steps") == 1
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 2
    again = launch(recipe)
    assert again.returncode != 0
    assert again.stderr.count("is not empty; continue the run in it with --resume") == 1


def wait_for_lines(path: Path, number: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and (not path.exists() or len(path.read_text().splitlines()) < number):
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_torchrun_restarts_a_run_whose_rank_was_killed_and_goes_on_with_other_numbers(make_tree, tmp_path):
    settings = {"steps": 16, "save_every": 3, "keep_checkpoints": 9}
    trees = {name: make_tree(name, **settings) for name in ("whole", "run")}
    recipes = {name: tmp_path / f"{name}.yaml" for name in trees}
    for name, tree in trees.items():
        recipes[name].write_text(yaml.safe_dump(tree))
    assert launch(recipes["whole"]).returncode == 0
    whole = jobs.trained_lines(trees["whole"])
    command = [*torchrun(2, "--max-restarts=2"), str(recipes["run"]), "--resume"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    wait_for_lines(tmp_path / "run" / "log.jsonl", 5)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert process.wait(600) == 0
    assert jobs.trained_lines(trees["run"]) == whole
    for size, kept in ((1, 6), (4, 9)):  # from an earlier checkpoint, with another number of processes
        for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
            if int(checkpoint.name.removeprefix("step-")) > kept:
                shutil.rmtree(checkpoint)
        again = launch(recipes["run"], "--resume", size=size)
        assert again.returncode == 0, again.stderr
        for found, wanted in zip(jobs.trained_lines(trees["run"]), whole, strict=True):
            assert found["samples"] == wanted["samples"]
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
