from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_scale.eval.text_metrics import anls, caption_words, cider_d, edit_distance, vqa_accuracy, vqa_normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat.", "cat"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("1,000", "1000"),
        ("3.5 meters", "3.5 meters"),
        ("black-and-white", "black and white"),
        ("yes, it is", "yes it is"),
        ("dont know", "don't know"),
        ("wed at the well", "wed at well"),
        ("a\nb\tthe c", "b c"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_vqa_does(text, expected):
    assert vqa_normalise(text) == expected


def test_soft_accuracy_is_the_mean_over_people_left_out():
    answers = ["cat"] * 3 + ["dog"] * 7
    assert vqa_accuracy("the cat", answers) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("dog", answers) == 1.0
    assert vqa_accuracy("bird", answers) == 0.0
    assert vqa_accuracy("cat", ["cat"] + ["dog"] * 9) == pytest.approx(9 * (1 / 3) / 10)
    assert vqa_accuracy("Two!", ["2"]) == 1.0


def test_anls_forgives_small_slips_only():
    assert anls("Hello World", ["hello  world"]) == 1.0
    assert anls("hella world", ["hello world"]) == pytest.approx(1 - 1 / 11)
    assert anls("hella", ["world", "hello"]) == pytest.approx(0.8)
    assert anls("abcd", ["wxyz"]) == 0.0
    assert anls("ab", ["abcde"]) == 0.0  # 0.4 is below the threshold
    assert anls("", [""]) == 1.0


def slow_distance(one, other):
    if not one or not other:
        return len(one) + len(other)
    return min(
        slow_distance(one[1:], other) + 1,
        slow_distance(one, other[1:]) + 1,
        slow_distance(one[1:], other[1:]) + (one[0] != other[0]),
    )


@given(st.text("ab", max_size=4), st.text("abc", max_size=4))
def test_edit_distance_is_levenshteins(one, other):
    assert edit_distance(one, other) == slow_distance(one, other)


def test_caption_words_are_lower_case_without_punctuation():
    assert caption_words("A man's dog, isn't it?") == ["a", "man", "'s", "dog", "is", "n't", "it"]


REFERENCES = [
    ["a red circle on the left", "the circle is red"],
    ["two blue squares", "a pair of blue squares"],
    ["a green star above a small yellow cross"],
]
ANSWERS = ["a red circle", "two blue squares", "a green cross above a star"]


def test_cider_d_gives_the_values_of_the_coco_evaluation():
    # computed with the reference implementation's own classes on the same words
    assert cider_d(ANSWERS, REFERENCES) == pytest.approx(COCO, abs=1e-9)


COCO = [2.818602859100971, 4.850746414514495, 2.7304133500937344]


def test_cider_d_by_hand():
    # one gram of each length in all, each in one of two samples: idf log 2, cosine 1, same length
    references = [["red blue green pink"], ["one two three four"]]
    assert cider_d(["red blue green pink", "x"], references) == pytest.approx([10.0, 0.0])
    # a repeated word is clipped: the answer's vector has 2 at "red", the reference 1
    found = cider_d(["red red", "one"], [["red"], ["one"]])
    assert found[0] == pytest.approx(10 / 4 * (1 * 1) / (2 * 1) * math.exp(-1 / 72))
