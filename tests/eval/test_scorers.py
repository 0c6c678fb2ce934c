from __future__ import annotations

import sys

import pytest

from llava_scale.errors import MissingExtraError
from llava_scale.eval.scorers import Response, mean_score, score_task, share_score
from llava_scale.eval.task_data import TaskItem
from llava_scale.eval.task_file import parse_task
from llava_scale.eval.tasks import Question
from llava_scale.types import Turn


def item(number, references=("x",), choices=(), answer=0):
    question = Question(number=number, key=str(number), turns=(Turn("user", "?"),), gold=references[0])
    return TaskItem(
        number=number,
        place=0,
        key=str(number),
        question=question,
        references=references,
        choices=choices,
        answer=answer,
    )


def score(scorer, answers, references, **fields):
    task = parse_task({"data": "x", "scorer": scorer, **fields}, origin="test")
    items = [item(number, tuple(golds)) for number, golds in enumerate(references)]
    return score_task(task, items, [Response(text=answer) for answer in answers])


def test_exact_match_takes_any_reference_and_has_a_wilson_interval():
    found = score("exact_match", ["Red.", "blue", "no"], [["red"], ["green", "Blue"], ["yes"]])
    assert found.points == [1.0, 1.0, 0.0]
    assert found.scores["exact_match"] == share_score([True, True, False])
    assert found.scores["exact_match"].method == "wilson"


def test_means_have_a_bootstrap_interval_that_repeats():
    values = [0.0, 0.3, 1.0, 1.0, 0.6] * 20
    one, again = mean_score(values), mean_score(values)
    assert one == again
    assert one.value == pytest.approx(0.58)
    assert 0.48 < one.low < 0.58 < one.high < 0.68
    assert mean_score([]).num_items == 0


def test_soft_scores_keep_their_points():
    found = score("vqa_accuracy", ["cat", "dog"], [["cat"] * 2 + ["dog"] * 8, ["dog"] * 10])
    assert found.points == pytest.approx([0.6, 1.0])
    assert found.scores["vqa_accuracy"].value == pytest.approx(0.8)
    assert score("anls", ["hella"], [["hello"]]).scores["anls"].value == pytest.approx(0.8)
    assert score("cider", ["a b", "c d"], [["a b"], ["c d"]]).scores["cider"].value == pytest.approx(5.0)


def test_bleu_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["the cat sat on the mat today", "a dog runs in the green park"]
    references = [["the cat sat on a mat today", "a cat sat on the mat today"], ["a dog runs through the green park"]]
    found = score("bleu", answers, references)
    streams = [
        ["the cat sat on a mat today", "a dog runs through the green park"],
        ["a cat sat on the mat today", None],
    ]
    assert found.scores["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(answers, streams).score)
    assert found.scores["bleu"].low <= found.scores["bleu"].value <= found.scores["bleu"].high


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(MissingExtraError, match=r"llava-scale\[eval\]"):
        score("bleu", ["a"], [["a"]])


def chosen(scorer, rows, **fields):
    task = parse_task({"data": "x", "scorer": scorer, **fields}, origin="test")
    items, responses = [], []
    for number, (scores, lengths, answer) in enumerate(rows):
        items.append(item(number, choices=tuple("abcdefgh"[: len(scores)]), answer=answer))
        responses.append(Response(scores=tuple(scores), lengths=tuple(lengths)))
    return score_task(task, items, responses)


def test_choices_are_compared_by_token_or_as_a_whole():
    rows = [([-4.0, -3.0], [4, 1], 0), ([-1.0, -2.0], [1, 1], 0), ([float("nan"), -2.0], [1, 1], 0)]
    by_token = chosen("multiple_choice", rows)
    assert by_token.points == [1.0, 1.0, 0.0]
    assert by_token.answers == ["a", "a", "b"]
    assert chosen("multiple_choice", rows, normalise="sum").points == [0.0, 1.0, 0.0]
    assert by_token.scores["chance"].value == 0.5


def test_equal_choices_are_not_counted_as_right():
    assert chosen("multiple_choice", [([-1.0, -1.0], [1, 1], 0)]).points == [0.0]


def test_a_ranking_has_top_five_too():
    found = chosen("ranking", [([-3.0, -1.0, -2.0, -9.0, -8.0, -7.0], [1] * 6, place) for place in range(6)])
    assert found.scores["top1"].value == pytest.approx(1 / 6)
    assert found.scores["top5"].value == pytest.approx(5 / 6)
