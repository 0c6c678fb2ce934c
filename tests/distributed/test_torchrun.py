from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python"]
COMMAND = [*TORCHRUN, str(Path(sys.executable).with_name("llava-scale")), "train"]


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.slow
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
