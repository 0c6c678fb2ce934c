from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_scale.config import to_dict
from llava_scale.model import load_model

SCRIPT = Path(__file__).with_name("killed_run.py")
ROUNDS = 20
REPRODUCED = ("step", "loss", "lr", "grad_norm", "samples", "text_tokens", "visual_tokens", "supervised_tokens")


def start(config, place: Path) -> subprocess.Popen[bytes]:
    place.mkdir(exist_ok=True)
    path = place / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    command = [sys.executable, str(SCRIPT), str(path), str(place / "used.jsonl")]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)


def wait_for_end(config, place: Path) -> None:
    process = start(config, place)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()


def kill_at(config, place: Path, moment: str, delay_s: float) -> bool:
    """Start, wait for the log to grow past its length (or the process to end), wait a little more, kill -9.

    Returns whether the process was still at work.
    """
    log = Path(config.train.output_dir) / "log.jsonl"
    size = log.stat().st_size if log.exists() else 0
    process = start(config, place)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if moment == "at once" or (log.exists() and log.stat().st_size > size):
            break
        time.sleep(0.01)
    time.sleep(delay_s)
    at_work = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    return at_work


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(make_config, tmp_path, precision):
    settings: dict[str, object] = {"steps": 0, "epochs": 20, "save_every": 3, "precision": precision}
    settings |= {"rows_per_step": 1, "data": {"packing": {"row_length": 256}}}
    whole = make_config(output_dir=str(tmp_path / "whole"), **settings)
    wait_for_end(whole, tmp_path / "a")
    config, place, draw = make_config(**settings), tmp_path / "b", random.Random(precision)
    hits = 0
    for number in range(ROUNDS):
        moment = "at once" if number % 5 == 0 else "in training"
        hits += kill_at(config, place, moment, draw.uniform(0, 6.0 if moment == "at once" else 0.2))
    wait_for_end(config, place)

    def logged(settings):
        lines = read(Path(settings.train.output_dir) / "log.jsonl")
        return [{key: line[key] for key in REPRODUCED} for line in lines]

    assert logged(config) == logged(whole)
    expected = {line["batch"]: line["keys"] for line in read(tmp_path / "a" / "used.jsonl")}
    used = read(place / "used.jsonl")
    assert hits > ROUNDS / 2, "the kills came too late to test anything"
    assert len(used) > len(expected), "no step was done twice: the kills came too late to test anything"
    assert all(line["keys"] == expected[line["batch"]] for line in used)
    assert {line["batch"] for line in used} == set(expected)
    keys = [key for batch in sorted(expected) for row in expected[batch] for key in row]
    counts = [keys.count(key) for key in set(keys)]
    assert len(counts) == 48
    assert max(counts) - min(counts) <= 2
    left, right = (load_model(Path(item.train.output_dir) / "final")[0].state_dict() for item in (whole, config))
    assert [name for name in left if not left[name].equal(right[name])] == []
