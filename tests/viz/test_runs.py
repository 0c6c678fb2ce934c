from __future__ import annotations

import pytest

from llava_scale.errors import CheckpointError
from llava_scale.viz.runs import differing_settings, distinct_names, read_run


def test_a_run_is_read_with_its_curves_settings_and_evaluation(run_folder):
    run = read_run(run_folder)
    assert run.name == "base"
    assert run.settings["train.learning_rate"] == 1e-3
    assert run.curves["loss"][0][0] == 10
    assert len(run.curves["eval/loss"]) == 4
    assert run.last["step"] == 2000
    assert run.evaluation["loss"] == 0.4123
    assert run.evaluation_dir == run_folder / "eval"


def test_a_torn_last_line_and_non_finite_losses_are_passed_over(tmp_path, make_run):
    folder = make_run(tmp_path / "a", name="a", steps=2)
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 30, "loss": null, "lr": 0.1}\n{"step": 40, "loss": NaN}\n{"step": 50, "lo')
    run = read_run(folder)
    assert [step for step, _ in run.curves["loss"]] == [10, 20]
    assert run.curves["lr"][-1] == (30, 0.1)


def test_a_folder_without_a_log_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no log\.jsonl; give the folder of a training run"):
        read_run(tmp_path)


def test_a_broken_evaluation_is_refused_by_name(tmp_path, make_run):
    folder = make_run(tmp_path / "a", name="a", steps=1)
    (folder / "eval.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"eval\.json"):
        read_run(folder)


def test_a_missing_evaluation_that_was_asked_for_is_an_error(tmp_path, make_run):
    folder = make_run(tmp_path / "a", name="a", steps=1)
    with pytest.raises(CheckpointError, match="make it with llava-scale eval"):
        read_run(folder, evaluation=tmp_path / "none.json")


def test_runs_of_one_name_are_told_apart_by_folder_or_number(tmp_path, make_run):
    first = read_run(make_run(tmp_path / "a", name="x", steps=1))
    second = read_run(make_run(tmp_path / "b", name="x", steps=1))
    assert [run.name for run in distinct_names([first, second])] == ["x (a)", "x (b)"]
    assert [run.name for run in distinct_names([first, first])] == ["x (a) #1", "x (a) #2"]


def test_only_differing_settings_are_listed(tmp_path, make_run):
    runs = [read_run(make_run(tmp_path / f"{lr}", name="x", lr=lr, steps=1)) for lr in (0.1, 0.2)]
    assert differing_settings(runs) == {"train.learning_rate": [0.1, 0.2]}
