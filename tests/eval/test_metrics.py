from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_scale.eval.metrics import (
    Share,
    blind_matches,
    exact_match,
    normalise_answer,
    rank_of,
    share_of,
    top_k,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A Red   circle. ", "a red circle"),
        ("It's left of the star!", "its left of the star"),
        ("Yes, two", "yes two"),
        ("-3", "-3"),
        ("2.5", "2.5"),
        ("1,000", "1000"),
        ("left-hand", "left hand"),
        ("Straße", "strasse"),
        ("हिन्दी।", "हिन्दी"),
        ("赤い丸。", "赤い丸"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_answers_lose_case_punctuation_and_extra_space(text, expected):
    assert normalise_answer(text) == expected


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text):
    once = normalise_answer(text)
    assert normalise_answer(once) == once


@pytest.mark.parametrize(("answer", "gold", "same"), [("Red.", "red", True), ("3", "-3", False), ("2.5", "25", False)])
def test_exact_match_compares_normalised_answers(answer, gold, same):
    assert exact_match(answer, gold) is same


def test_wilson_interval_matches_published_values():
    low, high = wilson_interval(15, 148)  # Newcombe 1998, table I
    assert low == pytest.approx(0.0624, abs=5e-5)
    assert high == pytest.approx(0.1605, abs=5e-5)


def test_wilson_interval_stays_open_at_the_ends():
    assert wilson_interval(0, 20) == (0.0, pytest.approx(0.1611, abs=5e-5))
    assert wilson_interval(20, 20) == (pytest.approx(0.8389, abs=5e-5), 1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_refuses_impossible_counts():
    with pytest.raises(ValueError, match="4 of 3"):
        wilson_interval(4, 3)


@given(st.integers(0, 500), st.integers(0, 500))
def test_the_share_lies_inside_its_interval(correct, wrong):
    share = Share(correct, correct + wrong)
    low, high = share.interval
    assert 0 <= low <= share.value <= high <= 1


def test_shares_count_true_outcomes():
    assert share_of([True, False, True]).to_json()["correct"] == 2
    assert share_of([]).value == 0.0


def test_blind_answers_are_the_most_frequent_ones_to_the_same_question():
    questions = ["What color?", "what color", "what color?", "How many?", "How many?"]
    golds = ["Red", "red.", "blue", "two", "one"]
    assert blind_matches(questions, golds, min_count=2) == [True, True, False, False, True]


def test_a_rare_question_is_guessed_from_those_that_begin_alike():
    questions = ["is there a red star", "is there a red cross", "is there a blue star", "is there", "where is it"]
    golds = ["no", "no", "yes", "yes", "left"]
    assert blind_matches(questions, golds, min_count=2) == [True, True, False, False, False]


def test_asking_each_question_once_gives_no_answers_away():
    questions = [f"what is behind object {i}?" for i in range(100)]
    golds = [f"object {i % 50}" for i in range(100)]
    assert sum(blind_matches(questions, golds)) == 2


def test_blind_scores_of_no_questions_are_empty():
    assert blind_matches([], []) == []


def test_ranks_count_ties_and_nan_against_the_own_entry():
    assert rank_of([0.1, 0.9, 0.5], 1) == 1
    assert rank_of([0.1, 0.9, 0.5], 2) == 2
    assert rank_of([0.5, 0.5, 0.1], 0) == 2
    assert rank_of([math.nan, 0.5], 0) == 2
    assert rank_of([math.nan, 0.5], 1) == 2


def test_top_k_is_the_share_of_ranks_within_k():
    assert top_k([1, 2, 6, 1], 1) == Share(2, 4)
    assert top_k([1, 2, 6, 1], 5) == Share(3, 4)
