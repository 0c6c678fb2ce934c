from __future__ import annotations

import sys
import types

import pytest

from llava_scale.errors import ConfigError
from llava_scale.eval.own_scorers import find_scorer, points_of, scorer
from llava_scale.eval.task_file import parse_task


@scorer
def length(answers, references):
    return [len(answer) / len(golds[0]) for answer, golds in zip(answers, references, strict=True)]


@pytest.fixture(autouse=True)
def module(monkeypatch):
    made = types.ModuleType("scorers_for_tests")
    made.length = length
    made.unmarked = lambda answers, references: [1.0]
    made.short = scorer(lambda answers, references: [1.0])
    made.words = scorer(lambda answers, references: list(answers))
    made.endless = scorer(lambda answers, references: [float("nan")] * len(answers))
    monkeypatch.setitem(sys.modules, "scorers_for_tests", made)


def test_a_marked_function_scores_all_answers_at_once():
    assert points_of("scorers_for_tests:length", ["ab", "a"], [["abcd"], ["a"]]) == [0.5, 1.0]


def test_task_files_take_a_scorer_by_import_path():
    task = parse_task({"data": "x.json", "scorer": "scorers_for_tests:length"}, origin="t")
    assert task.is_generated
    plain = parse_task({"data": "x.json", "scorer": "exact_match"}, origin="t")
    assert task.response_digest() == plain.response_digest()  # kept answers are scored anew, not asked again


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("scorers_for_tests:unmarked", "mark the function"),
        ("os:system", "mark the function"),
        ("scorers_for_tests:none", "cannot be imported"),
        ("no.such.module:f", "on PYTHONPATH"),
        (":f", "cannot be imported"),
    ],
)
def test_nothing_but_marked_functions_is_called(path, message):
    with pytest.raises(ConfigError, match=message):
        find_scorer(path)
    with pytest.raises(ConfigError, match=message):
        parse_task({"data": "x", "scorer": path}, origin="t")


@pytest.mark.parametrize(
    ("name", "message"),
    [("short", "1 points for 2 answers"), ("words", "must return numbers"), ("endless", "not finite")],
)
def test_points_that_are_none_are_named(name, message):
    with pytest.raises(ConfigError, match=message):
        points_of(f"scorers_for_tests:{name}", ["a", "b"], [["a"], ["b"]])
