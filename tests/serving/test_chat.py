from __future__ import annotations

import pytest

from llava_scale.errors import SampleError
from llava_scale.serving.chat import AnswerSettings, ChatSession
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
    assert session.add_image(picture) == (40, 30)
    first = "".join(session.ask("what is it?"))
    assert session.turns[0].text == "<image>\nwhat is it?"
    assert session.waiting == {}
    session.add_image(picture)
    "".join(session.ask("and <image> ?"))
    assert [turn.text for turn in session.turns[:3]] == ["<image>\nwhat is it?", first, "and <image> ?"]
    assert len(session.media["image"]) == 2


def test_later_answers_depend_on_the_history(session, picture):
    session.add_image(picture)
    "".join(session.ask("what is it?"))
    with_history = "".join(session.ask("sure?"))
    session.clear()
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

    monkeypatch.setattr(session.engine, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(session.ask("hello"))
    assert session.turns[-1] == Turn("assistant", "partly")


def test_a_question_that_fails_leaves_everything_as_it_was(session, picture):
    session.add_image(picture)
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
        session.add_image(path)
    assert session.waiting == {}
