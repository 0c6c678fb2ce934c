from __future__ import annotations

import json
import wave

import pytest

from llava_scale.data.records import parse_record
from llava_scale.errors import ConfigError, SampleError
from llava_scale.serving.chat import AnswerSettings, ChatSession
from llava_scale.serving.prompts import GenerationRequest
from llava_scale.types import Turn


@pytest.fixture
def session(engine):
    return ChatSession(engine, AnswerSettings(max_new_tokens=6))


@pytest.fixture
def picture(png, tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(png("red"))
    return path


def test_a_question_and_its_streamed_answer_become_history(session):
    answer = "".join(session.ask("hello"))
    assert session.turns == (Turn("user", "hello"), Turn("assistant", answer))


def test_a_picture_goes_with_the_next_question_and_stays_in_the_history(session, picture):
    info = session.add("image", picture)
    assert (info.width, info.height) == (40, 30)
    first = "".join(session.ask("what is it?"))
    assert session.turns[0].text == "<image>\nwhat is it?"
    assert session.waiting == {}
    session.add("image", picture)
    "".join(session.ask("and <image> ?"))
    assert [turn.text for turn in session.turns[:3]] == ["<image>\nwhat is it?", first, "and <image> ?"]
    assert len(session.media["image"]) == 2


def test_later_answers_depend_on_the_history(session, picture):
    session.add("image", picture)
    "".join(session.ask("what is it?"))
    with_history = "".join(session.ask("sure?"))
    session.reset()
    assert session.turns == ()
    assert "".join(session.ask("sure?")) != with_history


def test_a_stopped_answer_is_kept_as_far_as_it_was_written(session):
    stream = session.ask("hello")
    written = next(stream)
    stream.close()
    assert session.turns[-1] == Turn("assistant", written.strip())


def test_an_interrupt_while_reading_keeps_what_was_written(session, monkeypatch):
    def interrupted(*_, **__):
        yield "partly"
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_scale.serving.chat.text_pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(session.ask("hello"))
    assert session.turns[-1] == Turn("assistant", "partly")


def test_a_question_that_fails_leaves_everything_as_it_was(session, picture):
    session.add("image", picture)
    with pytest.raises(SampleError, match="2 <image> placeholders but 1 image"):
        list(session.ask("<image> <image> ?"))
    assert session.turns == ()
    assert len(session.waiting["image"]) == 1


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), (b"text", "x.png"), (b"", "x.png")])
def test_an_unreadable_picture_is_said_and_not_kept(session, tmp_path, content, message):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SampleError, match=message):
        session.add("image", path)
    assert session.waiting == {}


def from_scratch(session, turns, media):
    request = GenerationRequest(
        turns=turns, media={kind: [item.data for item in items] for kind, items in media.items()}
    )
    return session.engine.generate([request], max_new_tokens=session.settings.max_new_tokens)[0]


def test_each_turn_reads_only_what_is_new_and_answers_as_from_scratch(session, picture, png, tmp_path):
    blue = tmp_path / "blue.png"
    blue.write_bytes(png("blue"))
    known = 0
    read = []
    for number, question in enumerate(["what is it?", "sure?", "and this?", "which color?"]):
        if number in (0, 2):
            session.add("image", picture if number == 0 else blue)
        answer = "".join(session.ask(question))
        assert answer == from_scratch(session, session.turns[:-1], session.media)
        length = len(session.last.prompt.input_ids)
        read.append((session.last.num_prefilled, length))
        # an answer that the tokenizer splits in another way is read again, and nothing before it
        assert session.last.num_prefilled <= length - known
        known = length
    assert all(new < whole for new, whole in read[1:])
    assert all(new < whole / 2 for new, whole in read[2:])
    assert read[0][0] == read[0][1]


def test_another_beginning_is_read_again(session):
    "".join(session.ask("hello"))
    session.reset()
    "".join(session.ask("what is it?"))
    assert session.last.num_prefilled == len(session.last.prompt.input_ids)


def test_a_stopped_answer_goes_on_from_what_was_read(session):
    stream = session.ask("hello")
    next(stream)
    stream.close()
    turns = session.turns
    answer = "".join(session.ask("go on"))
    assert session.last.num_prefilled < len(session.last.prompt.input_ids)
    assert answer == from_scratch(session, (*turns, Turn("user", "go on")), {})


def test_a_saved_conversation_is_a_sample_that_can_be_packed(session, picture, tmp_path):
    session.add("image", picture)
    session.add("image", picture)
    "".join(session.ask("which?"))
    session.save(tmp_path / "talk.json")
    (record,) = json.loads((tmp_path / "talk.json").read_text())
    assert record["image"] == [str(picture), str(picture)]
    assert parse_record(record, {"image": 2}) == session.turns
    with pytest.raises(ConfigError, match="is there already"):
        session.save(tmp_path / "talk.json")
    with pytest.raises(ConfigError, match="cannot write"):
        session.save(tmp_path / "nowhere" / "talk.json")


def test_media_that_the_model_does_not_take_are_refused_at_once(session, tmp_path):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes(b"\0" * 3200)
    with pytest.raises(SampleError, match=r"a\.wav: this model reads"):
        session.add("audio", path)
    assert session.waiting == {}
