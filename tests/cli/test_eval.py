from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from llava_scale.cli import build_app
from llava_scale.config import ModelConfig
from llava_scale.errors import ConfigError
from llava_scale.model import build_model
from tests.eval.conftest import picture, write_shard


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "final"
    model, processor = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path):
    colors = ("red", "green", "blue", "yellow")
    records = []
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(picture(colors[number % 4], number))
        records.append({"id": f"q{number}", "image": f"{number}.png", "question": "What color is it?",
                        "answer": colors[number % 4], "choices": list(colors)})  # fmt: skip
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "written.yaml").write_text("data: records.json\nscorer: vqa_accuracy\nmax_new_tokens: 4\n")
    (tmp_path / "chosen.yaml").write_text("data: records.json\nscorer: multiple_choice\n")
    return tmp_path / "written.yaml", tmp_path / "chosen.yaml"


def invoke(*arguments: object):
    done = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def scores(folder):
    content = json.loads((folder / "tasks.json").read_text())
    return [(task["name"], task["scores"], task["num_answers"]) for task in content["tasks"]]


def test_task_files_are_run_scored_written_and_kept(checkpoint, tasks, tmp_path):
    done = invoke("eval", checkpoint, "--tasks", *tasks, "--out", tmp_path / "out")
    assert done.exit_code == 0
    assert "vqa_accuracy" in done.stdout
    assert "accuracy" in done.stdout
    assert [name for name, _, _ in scores(tmp_path / "out")] == ["written", "chosen"]
    assert "data:image/jpeg" in (tmp_path / "out/tasks.html").read_text()
    again = invoke("eval", checkpoint, "--tasks", *tasks, "--out", tmp_path / "out")
    assert "written: 12 answers were there already" in again.stdout
    fresh = invoke("eval", checkpoint, "--tasks", tasks[0], "--out", tmp_path / "out", "--fresh")
    assert "there already" not in fresh.stdout


def test_what_to_evaluate_must_be_said(checkpoint, tasks, tmp_path):
    with pytest.raises(ConfigError, match="either task files"):
        invoke("eval", checkpoint)
    with pytest.raises(ConfigError, match="either task files"):
        invoke("eval", checkpoint, "--data", tmp_path, "--tasks", tasks[0])
    with pytest.raises(ConfigError, match="task names must differ"):
        invoke("eval", checkpoint, "--tasks", tasks[0], tasks[0])


@pytest.mark.slow
def test_two_processes_write_what_one_writes(checkpoint, tasks, tmp_path):
    invoke("eval", checkpoint, "--tasks", *tasks, "--out", tmp_path / "one")
    done = invoke("eval", checkpoint, "--tasks", *tasks, "--out", tmp_path / "two", "--processes", 2)
    assert done.exit_code == 0
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
    assert len(list((tmp_path / "two/answers").glob("written-*.jsonl"))) == 2
    for name in ("answers-written.jsonl", "answers-chosen.jsonl"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


@pytest.mark.slow
def test_two_processes_find_on_packed_data_what_one_finds(checkpoint, tmp_path):
    shards = write_shard(tmp_path / "shards", broken=(3, 18))
    arguments = ("eval", checkpoint, "--data", shards, "--ranking", 4, "--examples", 6, "--max-new-tokens", 4)
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = invoke(*arguments, "--out", out, "--processes", processes)
        assert done.exit_code == 0
        found.append(json.loads((out / "eval.json").read_text()))
    one, two = found
    assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=1e-6)
    assert set(one.pop("seconds")) == set(two.pop("seconds"))
    assert one == two
    assert one["num_samples"] == 30
    assert len(one["skipped"]) == 2
    assert one["ranking"]["num_samples"] == 8
