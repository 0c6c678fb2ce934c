from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from llava_scale.errors import MissingExtraError
from llava_scale.training.tracker_services import make_trackers

LINE = {"step": 3, "loss": 1.5, "grad_norm": None, "samples": 7}


def make(name, folder, start_step=0):
    (tracker,) = make_trackers((name,), folder=folder, run_name="run", config={"seed": 1}, start_step=start_step)
    return tracker


def test_tensorboard_reads_back_what_was_logged_and_a_resumed_run_replaces_later_lines(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = make("tensorboard", tmp_path, start)
        for step in steps:
            tracker.log({**LINE, "step": step, "eval/loss": 10.0 * start + step})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/samples", "eval/loss"}
    assert [(item.step, item.value) for item in events.Scalars("eval/loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_go_to_a_page_that_a_resumed_run_finds_again(tmp_path, monkeypatch, name):
    started, logged = [], []

    def init(**arguments):
        started.append(arguments)
        return SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
        )

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    for _ in range(2):
        tracker = make(name, tmp_path)
        tracker.log(LINE)
        tracker.close()
    assert logged[:2] == [(3, {"train/loss": 1.5, "train/samples": 7}), "end"]
    assert started[0] == started[1]
    assert started[0]["resume"] == "allow"
    assert started[0]["config"] == {"seed": 1}
    make(name, tmp_path / "other")
    assert started[2] != started[0]


@pytest.mark.slow
def test_wandb_works_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = make("wandb", tmp_path)
    tracker.log(LINE)
    tracker.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{name} is not installed.*llava-scale\[track\]"):
        make(name, tmp_path)
