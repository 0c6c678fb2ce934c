from __future__ import annotations

from llava_scale.data.media import decode_image
from llava_scale.eval.tasks import BlindGenerate, Question, questions_of
from llava_scale.types import Sample, Turn


def sample() -> Sample:
    turns = (
        Turn("system", "be short"),
        Turn("user", "<image>\nWhat color?"),
        Turn("assistant", "red"),
        Turn("user", "And <image> ?"),
        Turn("assistant", "blue"),
    )
    media = {"image": (("png", b"one"), ("png", b"two"))}
    return Sample(key="k", shard="s", turns=turns, media=media, extra={"task": "color"})


def test_every_answer_is_a_question_after_the_true_history():
    first, second = questions_of(sample(), 7)
    assert (first.gold, second.gold) == ("red", "blue")
    assert first.turns == sample().turns[:2]
    assert second.turns == sample().turns[:4]
    assert (first.number, first.key, first.task) == (7, "k", "color")


def test_a_question_has_the_pictures_that_were_shown_until_then():
    first, second = questions_of(sample(), 0)
    assert first.media == {"image": (b"one",)}
    assert second.media == {"image": (b"one", b"two")}


def test_the_text_of_a_question_has_no_placeholders():
    assert [question.text for question in questions_of(sample(), 0)] == ["What color?", "And  ?"]


def test_modalities_are_told_by_the_media():
    def made(**media: tuple[bytes, ...]) -> str:
        return Question(number=0, key="", turns=(Turn("user", "?"),), media=media, gold="").modality

    assert made() == "text"
    assert made(image=(b"1", b"2")) == "image"
    assert made(image=(b"1",), video=(b"2",)) == "video"
    assert made(image=(b"1",), video=(b"2",), audio=(b"3",)) == "video_audio"


def test_blind_questions_have_plain_pictures_and_are_asked_once():
    asked = []

    def generate(questions):
        asked.extend(questions)
        return [str(len(asked))] * len(questions)

    blind = BlindGenerate(generate, colour=(10, 20, 30), size=4)
    questions = [*questions_of(sample(), 0), *questions_of(sample(), 1)]
    answers = blind(questions)
    assert blind(questions[:1]) == answers[:1] == answers[2:3]
    assert len(asked) == 2
    assert len(asked[1].media["image"]) == 2
    pixels = decode_image(asked[0].media["image"][0], max_pixels=100)
    assert pixels.flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]


def test_blind_questions_about_videos_and_sounds_ask_for_blank_ones():
    asked = []

    def generate(questions):
        asked.extend(questions)
        return ["?"] * len(questions)

    blind = BlindGenerate(generate, colour=(0, 0, 0), size=4)
    turns = (Turn("user", "<video> what?"),)
    first, second = (
        Question(number=number, key="", turns=turns, media={"video": (b"clip",)}, gold="") for number in (0, 1)
    )
    assert blind([first, second, first]) == ["?"] * 3
    assert [(question.number, question.change) for question in asked] == [(0, "blank"), (1, "blank")]
    assert asked[0].media == first.media
