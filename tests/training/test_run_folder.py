from __future__ import annotations

import json

import pytest

from llava_scale.config import load_config, to_dict
from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.training.run_folder import RunFolder, check_same_run, read_lines


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {preset: tiny}\ndata: {sources: [{path: a}, {path: b}]}\n")
    return path


def test_a_new_or_empty_folder_may_be_used(tmp_path):
    RunFolder(tmp_path / "new").check_startable(resume=False)
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").check_startable(resume=False)


def test_a_folder_with_something_in_it_is_refused_and_the_way_out_named(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"not empty; continue the run in it with --resume, or .*output_dir"):
        RunFolder(tmp_path).check_startable(resume=False)
    RunFolder(tmp_path).check_startable(resume=True)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "file").check_startable(resume=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path, recipe):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write into .*file/run: Not a directory"):
        RunFolder(tmp_path / "file" / "run").create(load_config(recipe))


def test_rewinding_drops_later_lines_and_half_a_line(tmp_path):
    folder = RunFolder(tmp_path)
    lines = [{"step": 10, "loss": 1.0}, {"step": 10, "eval/loss": 2.0}, {"step": 20, "loss": 0.5}]
    folder.log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 21, "lo')
    folder.rewind(10)
    assert list(folder.lines()) == lines[:2]
    assert folder.evaluations() == [{"step": 10, "eval/loss": 2.0}]
    folder.rewind(0)
    assert folder.log.read_text() == ""


def test_skipped_samples_of_batches_that_come_again_are_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    folder.skipped.write_text("".join(json.dumps({"step": batch, "key": str(batch)}) + "\n" for batch in range(5)))
    folder.rewind(3)
    assert [line["step"] for line in read_lines(folder.skipped)] == [0, 1, 2]


def test_a_log_that_is_not_there_has_no_lines(tmp_path):
    assert list(RunFolder(tmp_path).lines()) == []


def test_settings_that_compute_the_same_may_change_on_resume(tmp_path, recipe):
    stored = to_dict(load_config(recipe))
    overrides = [
        "train.log_every=1",
        "data.num_workers=0",
        "train.eval_rows=3",
        "data.cache_dir=x",
        "data.sources.0.path=moved",
    ]
    check_same_run(stored, load_config(recipe, overrides), tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=0.5", r"train\.learning_rate: 2e-05 -> 0\.5"),
        ("data.sources.1.weight=2", r"data\.sources\.1\.weight: 1\.0 -> 2\.0"),
        ("data.sources=[{path: a}]", r"data\.sources\.1\.weight: 1\.0 -> 'not set'"),
        ("seed=3", "seed: 0 -> 3"),
        ("train.trainable={vision_tower: 1e-3}", "trainable"),
    ],
)
def test_settings_that_matter_are_listed_on_resume(tmp_path, recipe, override, message):
    with pytest.raises(ConfigError, match=message):
        check_same_run(to_dict(load_config(recipe)), load_config(recipe, [override]), tmp_path)
