from __future__ import annotations

import json

import pytest

from llava_scale.errors import ConfigError, SampleError
from llava_scale.eval.task_data import all_captions, fill, open_source, read_items
from llava_scale.eval.task_file import load_task, parse_task
from tests.eval.conftest import picture


def write(folder, text):
    path = folder / "colors.yaml"
    path.write_text(text)
    return path


def records_file(folder, records):
    (folder / "a.png").write_bytes(picture("red", 1))
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    return path


def items_of(task):
    source = open_source(task)
    return [item for items in read_items(task, source, range(len(source))) for item in items]


def test_paths_count_from_the_task_file_and_the_name_is_the_files(tmp_path):
    task = load_task(write(tmp_path, "data: records.json\nscorer: exact_match\n"))
    assert task.name == "colors"
    assert task.data == str(tmp_path / "records.json")
    remote = load_task(write(tmp_path, "data: s3://bucket/x\nscorer: anls\nname: far\n"))
    assert (remote.data, remote.name) == ("s3://bucket/x", "far")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: x\nscorer: exactmatch\n", "did you mean 'exact_match'"),
        ("data: x\nscorer: anls\nlimt: 3\n", "unknown field 'limt'; did you mean 'limit'"),
        ("data: x\nscorer: anls\nlimit: -3\n", "limit: "),
        ("- a\n", "a task file holds fields"),
        ("a: [", "is no YAML"),
    ],
)
def test_mistakes_in_task_files_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_task(write(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot read task file"):
        load_task(tmp_path / "none.yaml")


def test_records_become_questions_with_references_and_prompt(tmp_path):
    records_file(
        tmp_path,
        [
            {"id": "x", "image": "a.png",
             "question": "What color?", "n": 3, "answers": ["red", {"answer": "dark red"}]},
            {"image": ["a.png", "a.png"], "conversations": [{"from": "human", "value": "<image><image> Same?"},
             {"from": "gpt", "value": "yes"}, {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]},
            {"question": "No picture?", "answer": "none", "image": "missing.png"},
        ],
    )  # fmt: skip
    path = write(tmp_path, 'data: records.json\nscorer: anls\nprompt: "{question} ({n}) One word."\nwhere: {n: 3}\n')
    first, broken = items_of(load_task(path))
    assert first.references == ("red", "dark red")
    assert first.question.turns[-1].text == "<image>\nWhat color? (3) One word."
    assert isinstance(broken, SampleError)
    assert "missing.png" in str(broken)
    items = items_of(parse_task({"data": str(tmp_path / "records.json"), "scorer": "anls"}, origin="test"))
    assert [item.place for item in items[:3]] == [0, 0, 1]
    assert len(items[2].question.media["image"]) == 2
    assert items[0].digest != items[1].digest


def test_choices_are_given_by_number_letter_or_text(tmp_path):
    base = {"question": "?", "choices": ["red", "blue"]}
    made = [{**base, "answer": answer} for answer in (1, "B", "b.", "blue", "green")]
    records_file(tmp_path, made)
    task = parse_task(
        {"data": str(tmp_path / "records.json"), "scorer": "multiple_choice", "prompt": "{question}\n{choices}"},
        origin="t",
    )
    *good, bad = items_of(task)
    assert [item.answer for item in good] == [1, 1, 1, 1]
    assert good[0].question.turns[-1].text == "?\nA. red\nB. blue"
    assert "'green' is none of its 2 choices" in str(bad)


def test_candidates_of_a_ranking_are_drawn_the_same_each_time(tmp_path):
    made = [{"id": i, "question": "Describe.", "answer": f"caption {i}"} for i in range(6)]
    records_file(tmp_path, made)
    task = parse_task({"data": str(tmp_path / "records.json"), "scorer": "ranking", "candidates": 3}, origin="t")
    source = open_source(task)
    captions = all_captions(task, source, range(6))
    drawn = [next(read_items(task, source, [number], captions))[0] for number in range(6)]
    assert [item.choices[item.answer] for item in drawn] == [f"caption {i}" for i in range(6)]
    assert all(len(set(item.choices)) == 3 for item in drawn)
    assert drawn == [next(read_items(task, source, [number], captions))[0] for number in range(6)]
    with pytest.raises(ConfigError, match="two different captions"):
        all_captions(task, source, [0])


def test_prompts_look_up_plain_names_only():
    assert fill("{question} {{x}}", {"question": "a {b}"}) == "a {b} {x}"
    for template in ("{question.__class__}", "{question[0]}", "{other}", "{question!r}", "{question:>9}"):
        with pytest.raises(SampleError, match="does not have"):
            fill(template, {"question": "a"})


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot read"), ("[]", "list of records"), ('{"a": 1}', "list of records")]
)
def test_files_without_records_are_named(tmp_path, content, message):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        open_source(parse_task({"data": str(tmp_path / "r.json"), "scorer": "anls"}, origin="t"))
