from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from llava_scale.cli import build_app, main
from llava_scale.errors import ConfigError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "shard-00000.tar", "w") as tar:
        for number in range(12):
            turns = [{"from": "human", "value": "Say red."}, {"from": "gpt", "value": "red " * (1 + number % 3)}]
            data = json.dumps({"id": str(number), "conversations": turns}).encode()
            info = tarfile.TarInfo(f"{number}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    tree = {
        "model": {"preset": "tiny"},
        "data": {"sources": [{"path": str(shards)}], "packing": {"row_length": 64}, "num_workers": 0},
        "train": {"output_dir": str(tmp_path / "run"), "steps": 3, "log_every": 1, "learning_rate": 1e-3},
    }
    tree["data"]["cache_dir"] = str(tmp_path / "cache")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def call(*arguments: object) -> int:
    """Exit code of the command, run in this process; our errors pass through."""
    return build_app()([str(argument) for argument in arguments], standalone_mode=False) or 0


def test_training_opens_with_a_summary_and_closes_with_the_next_command(recipe, tmp_path, capsys):
    assert call("train", recipe) == 0
    shown = capsys.readouterr().out
    for part in ("projector", "12 samples", "step 3/3", "3 of 3 steps", "step-00000003", "next"):
        assert part in shown
    assert f"llava-scale chat {tmp_path / 'run' / 'final'} --image PICTURE 'QUESTION'" in shown


def test_settings_on_the_command_line_win(recipe, tmp_path, capsys):
    call("train", recipe, "train.steps=1", f"train.output_dir={tmp_path / 'other'}")
    assert "1 of 1 steps" in capsys.readouterr().out
    assert (tmp_path / "other" / "final").is_dir()


def test_the_printed_config_is_complete_and_loads(recipe, tmp_path, capsys):
    call("train", recipe, "train.steps=5", "--print-config")
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["train"]["steps"], tree["train"]["adam_eps"]) == (5, 1e-8)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_first_batch_and_writes_nothing(recipe, tmp_path, capsys):
    call("train", recipe, "--dry-run")
    shown = capsys.readouterr().out
    assert "1 rows, " in shown
    assert "nothing was trained or written" in shown
    assert not (tmp_path / "run").exists()


def test_a_second_start_says_how_to_go_on(recipe):
    call("train", recipe, "train.steps=1")
    with pytest.raises(ConfigError, match="--resume"):
        call("train", recipe)
    assert call("train", recipe, "train.steps=1", "--resume") == 0


def test_an_error_is_one_line_and_exit_code_2(recipe, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llava-scale", "train", str(recipe), "train.trainable={nothing: 1}"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: train.trainable: 'nothing' matches no parameter")
    assert len(shown.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", [["data.num_workers=0"], ["data.num_workers=1", "data.worker_type=process"]])
def test_an_interrupted_command_saves_and_says_how_to_continue(recipe, tmp_path, number, code, workers):
    program = "from llava_scale.cli import main; main()"
    command = [sys.executable, "-c", program, "train", str(recipe), "train.steps=100000", *workers]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches the loader's workers too
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert f"stopped by {number.name}; everything is saved" in shown
    assert f"llava-scale train {tmp_path / 'run'}/config.yaml --resume" in shown
    assert list((tmp_path / "run" / "checkpoints").iterdir())
