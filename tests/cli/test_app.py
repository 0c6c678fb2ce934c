from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "transformers", "numpy", "av", "PIL")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llava_scale", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_loads_nothing_heavy():
    probe = (
        "import sys\nsys.argv = ['llava-scale', '--help']\n"
        "from llava_scale.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    assert "Usage" in done.stdout
    assert "LOADED []" in done.stdout


def test_help_answers_in_half_a_second():
    run("--help")
    best = min(_seconds() for _ in range(5))
    assert best < 0.5


def _seconds() -> float:
    start = time.perf_counter()
    assert run("--help").returncode == 0
    return time.perf_counter() - start


def test_doctor_reports_versions_and_decodes_a_picture():
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout
    assert "JPEG decoded" in done.stdout


@pytest.mark.parametrize("command", ["data", "train", "eval", "chat", "run", "report", "quickstart", "doctor"])
def test_every_command_explains_itself(command):
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_an_unknown_config_key_ends_with_one_clear_message(tmp_path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text("model: {preset: tiny}\ntrain: {stpes: 3}\n")
    done = run("train", str(recipe))
    assert done.returncode == 2
    assert "unknown key 'train.stpes'; did you mean 'steps'?" in done.stderr
    assert "Traceback" not in done.stderr
