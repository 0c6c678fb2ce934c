from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis.strategies import binary, lists, sampled_from, tuples

from llava_scale.data.records import join_frames, load_record, parse_record, split_frames
from llava_scale.errors import SampleError
from llava_scale.types import Turn


def conversation(*turns: tuple[str, str]) -> dict[str, object]:
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def test_speakers_become_roles():
    record = conversation(
        ("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("user", "Bye"), ("assistant", "So long")
    )
    assert [turn.role for turn in parse_record(record, {})] == ["system", "user", "assistant", "user", "assistant"]


def test_media_that_the_text_never_mentions_come_first_once():
    record = conversation(("system", "S"), ("human", "Hear <audio>?"), ("gpt", "A"), ("human", "B"), ("gpt", "C"))
    turns = parse_record(record, {"image": 2, "audio": 1, "video": 1})
    assert turns[1] == Turn("user", "<image>\n<image>\n<video>\nHear <audio>?")
    assert [turn.text for turn in turns[2:]] == ["A", "B", "C"]


def test_placeholders_may_stand_in_several_turns():
    record = conversation(("human", "<image>"), ("gpt", "A"), ("human", "and <image>"), ("gpt", "C"))
    assert parse_record(record, {"image": 2})[2].text == "and <image>"


@pytest.mark.parametrize(
    ("markers", "counts", "message"),
    [
        (3, {"image": 2}, "has 3 <image> placeholders but 2 images; add the missing image or remove the surplus"),
        (1, {}, "has 1 <image> placeholder but 0 images"),
        (1, {"image": 2}, "has 1 <image> placeholder but 2 images; mark every one or remove the surplus"),
    ],
)
def test_placeholders_and_media_that_differ_in_number_are_refused(markers, counts, message):
    with pytest.raises(SampleError, match=message):
        parse_record(conversation(("human", "<image>" * markers), ("gpt", "A")), counts)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b'"x"', b"null"])
def test_what_is_no_json_object_is_refused(data):
    with pytest.raises(SampleError):
        load_record(data)


@pytest.mark.parametrize("messages", [None, {}, [], "x", [1], [{"from": "human", "value": 1}], [{"value": "x"}]])
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(SampleError):
        parse_record({"conversations": messages}, {})


@given(lists(tuples(sampled_from(["jpg", "png"]), binary(max_size=40)), min_size=1, max_size=6))
def test_joined_frames_come_apart_again(frames):
    assert split_frames(join_frames(frames)) == tuple(frames)
