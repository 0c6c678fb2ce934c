from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from llava_scale.errors import CheckpointError
from llava_scale.training.recipe import ModuleSummary
from llava_scale.training.summary import MemoryEstimate, RunSummary
from llava_scale.training.trackers import CallbackTracker, ConsoleTracker, JsonlTracker, Tracker, Trackers

LINE = {"step": 5, "loss": 1.25, "lr": 2e-4, "tokens_per_s": 1234.5, "data_wait": 0.031, "skipped": 2}
SUMMARY = RunSummary(
    name="demo",
    stage="align",
    device="CPU, 1 thread",
    precision="bf16",
    modules=(
        ModuleSummary(name="vision_tower", num_parameters=1_000, num_trainable=0, learning_rates=()),
        ModuleSummary(name="projector", num_parameters=2_000, num_trainable=2_000, learning_rates=(1e-3, 1e-4)),
    ),
    num_samples=321,
    start_step=4,
    total_steps=10,
    epochs=1.5,
    step_size="2 rows of 100 tokens",
    memory=MemoryEstimate(weights=1.0, training=0.5, activations=0.0),
    output_dir=Path("runs/demo"),
)


def written(*, terminal: bool = False) -> tuple[ConsoleTracker, io.StringIO]:
    text = io.StringIO()
    return ConsoleTracker(Console(file=text, width=120, force_terminal=terminal)), text


def test_the_opening_names_what_is_trained_on_what_and_where_it_goes():
    tracker, text = written()
    tracker.open(SUMMARY)
    shown = text.getvalue()
    for part in (
        "demo: stage align",
        "frozen",
        "0.001, 0.0001",
        "321 samples",
        "going on at 4",
        "runs/demo",
        "1.00 GiB",
    ):
        assert part in shown


def test_without_a_terminal_every_line_is_plain_text_with_an_eta():
    tracker, text = written()
    tracker.open(SUMMARY)
    tracker.step(5)
    tracker.log(LINE)
    tracker.log({"step": 5, "eval/loss": 2.5, "eval/samples": 7})
    tracker.log({"step": 5, "event": "non_finite", "keys": ["a"]})
    tracker.note("saved")
    tracker.close()
    lines = text.getvalue().splitlines()[-3:]
    assert lines[0].startswith("step 5/10  loss 1.2500  lr 2.00e-04  1,234 tokens/s  waiting 3%  skipped 2  ETA 0:0")
    assert lines[1:] == ["step 5/10  eval/loss 2.5000  eval/samples 7", "saved"]


def test_on_a_terminal_a_bar_moves():
    tracker, text = written(terminal=True)
    tracker.open(SUMMARY)
    tracker.step(5)
    tracker.log(LINE)
    tracker.close()
    assert "5/10" in text.getvalue()
    assert "loss 1.2500" in text.getvalue()


def test_a_step_without_a_finite_loss_can_be_shown():
    tracker, text = written()
    tracker.open(SUMMARY)
    tracker.log({**LINE, "loss": None})
    assert "loss None" in text.getvalue()


def test_the_file_holds_one_object_a_line_and_goes_on_where_it_ended(tmp_path):
    for step in (1, 2):
        tracker = JsonlTracker(tmp_path / "log.jsonl")
        tracker.log({"step": step})
        tracker.close()
    assert [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
    ]


def test_a_value_that_json_has_no_word_for_is_refused(tmp_path):
    tracker = JsonlTracker(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        tracker.log({"step": 1, "loss": float("nan")})


def test_several_trackers_all_hear_everything():
    heard: list[object] = []

    class Ear(Tracker):
        def open(self, summary):
            heard.append(summary.name)

        def step(self, step):
            heard.append(step)

        def note(self, text):
            heard.append(text)

        def close(self):
            heard.append("closed")

    tracker = Trackers([Ear(), CallbackTracker(heard.append), Tracker()])
    tracker.open(SUMMARY)
    tracker.step(5)
    tracker.log(LINE)
    tracker.note("note")
    tracker.close()
    assert heard == ["demo", 5, LINE, "note", "closed"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_on_a_full_disk_says_so_and_can_still_be_closed():
    tracker = JsonlTracker(Path("/dev/full"))
    with pytest.raises(CheckpointError, match=r"cannot write /dev/full: No space left on device; mend that.*--resume"):
        tracker.log({"step": 1})
    tracker.close()
