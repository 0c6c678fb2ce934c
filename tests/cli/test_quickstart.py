from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from llava_scale.cli import build_app
from llava_scale.cli.quickstart import MODALITIES, RECIPE, _Stages
from llava_scale.config import load_config

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ["--num-samples", "40", "--num-test", "150", "train.steps=2", "train.eval_every=0", "train.save_every=0"]


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(build_app(), list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _stage(out: Path, name: str, inputs: dict[str, int], done: list[str], stages: _Stages | None = None) -> _Stages:
    stages = stages or _Stages(out)
    stages.run(name, f"do {name}", inputs, lambda: done.append(name))
    return stages


def test_a_stage_is_done_once_for_the_same_inputs(tmp_path: Path):
    done: list[str] = []
    for _ in range(2):
        _stage(tmp_path, "data", {"seed": 1}, done)
    assert done == ["data"]
    _stage(tmp_path, "data", {"seed": 2}, done)
    assert done == ["data", "data"]


def test_a_stage_that_changed_makes_the_later_ones_stale(tmp_path: Path):
    done: list[str] = []
    for seed in (1, 1, 2):
        stages = _stage(tmp_path, "data", {"seed": seed}, done)
        _stage(tmp_path, "train", {"steps": 5}, done, stages)
    assert done == ["data", "train", "data", "train"]


def test_a_stage_that_failed_is_done_again(tmp_path: Path):
    def fail() -> None:
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        _Stages(tmp_path).run("data", "do data", {}, fail)
    done: list[str] = []
    _stage(tmp_path, "data", {}, done)
    assert done == ["data"]


def test_the_packaged_recipe_is_the_one_in_configs():
    from pathlib import Path as LocalPath

    shown = LocalPath(__file__).parents[2] / "configs" / "quickstart.yaml"
    assert shown.read_text(encoding="utf-8") == RECIPE.read_text(encoding="utf-8")
    assert load_config(RECIPE).model.preset == "tiny"


def test_data_toy_writes_both_splits_and_says_what_to_do_next(tmp_path: Path):
    output = _run("data", "toy", str(tmp_path), "--num-samples", "6", "--num-test", "3", "--seed", "5")
    assert len(json.loads((tmp_path / "train.json").read_text())) == 6
    assert len(json.loads((tmp_path / "test.json").read_text())) == 3
    assert "llava-scale data pack" in output.replace("\n", " ")


@pytest.mark.slow
def test_the_quickstart_ends_with_a_summary_and_running_it_again_reuses_every_stage(tmp_path: Path):
    first = _run("quickstart", "--out", str(tmp_path), *SMALL)
    assert first.count("(done before)") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    for scores in ("exact_match", "blind", "blind_model"):
        assert set(MODALITIES) - {"text"} <= set(summary[scores])
        assert all(0 <= value <= 1 for value in summary[scores].values())
    assert set(summary["video_order"]) == {"right", "frames_shuffled"}
    assert summary["loss"] > 0
    assert set(summary["seconds"]) >= {"data", "pack", "train", "eval", "total"}
    assert (tmp_path / "report.html").stat().st_size > 1000
    asked = json.loads((tmp_path / "answers.json").read_text())
    assert {len(line["media"]) for line in asked} >= {0, 1, 2}
    assert all(line["question"] and "<" not in line["question"] for line in asked)

    again = _run("quickstart", "--out", str(tmp_path), *SMALL)
    assert again.count("(done before)") == 5
    assert json.loads((tmp_path / "summary.json").read_text()) == summary

    other = _run("quickstart", "--out", str(tmp_path), *SMALL, "train.learning_rate=1e-4")
    assert other.count("(done before)") == 2  # data and shards stay, training and what follows do not
