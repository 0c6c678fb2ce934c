from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from llava_scale.errors import CheckpointError
from llava_scale.training.trainer import train


@pytest.fixture
def small_disk(tmp_path):
    """A folder that is a disk of its own, and a function that sets its size in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield (
        folder,
        lambda size: subprocess.run(
            ["mount", "-o", f"remount,size={size}", "none", str(folder)], check=True, capture_output=True
        ),
    )
    subprocess.run(["umount", "-l", str(folder)], check=True)


def losses(config):
    lines = map(json.loads, (Path(config.train.output_dir) / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "lr" in line]


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("in_background", [False, True])
def test_a_disk_that_runs_full_in_a_checkpoint_costs_the_steps_since_the_one_before(
    make_config, tmp_path, small_disk, in_background
):
    folder, resize = small_disk
    settings = {"async_checkpoint": in_background, "keep_checkpoints": 3}
    whole = make_config(output_dir=str(tmp_path / "whole"), **settings)
    train(whole)
    one = size_of(tmp_path / "whole" / "checkpoints" / "step-00000002")
    config = make_config(output_dir=str(folder / "run"), **settings)
    resize(int(1.5 * one))
    with pytest.raises(CheckpointError, match=r"cannot write .*step-00000004: .*No space left.*--resume"):
        train(config)
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    resize(10 * one)
    assert train(config, resume=True).steps == 6
    assert losses(config) == losses(whole)
