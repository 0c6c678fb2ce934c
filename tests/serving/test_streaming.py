from __future__ import annotations

import pytest

from llava_scale.serving.streaming import TextStream, text_pieces


def decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_join_to_the_stripped_text():
    pieces = list(text_pieces(iter(b"  two words  \n"), decode))
    assert "".join(pieces) == "two words"
    assert all(piece for piece in pieces)


def test_characters_of_several_tokens_come_whole():
    pieces = list(text_pieces(iter("né€😀!".encode()), decode))
    assert pieces == ["n", "é", "€", "😀", "!"]


def test_a_character_cut_short_by_the_end_is_not_lost():
    assert "".join(text_pieces(iter("ok €".encode()[:-1]), decode)) == "ok �"


@pytest.mark.parametrize("text", ["yes END no", "yesEND", "yes  EN END", "yes EN", "END", "yes"])
def test_an_answer_ends_before_a_stop_text(text):
    stream = TextStream(decode, ["END", "never"])
    pieces = []
    for number in text.encode():
        pieces.append(stream.push(number))
        if stream.stopped:
            break
    pieces.append(stream.end())
    assert "".join(pieces) == text.split("END")[0].strip()
    assert stream.stopped == ("END" in text)


def test_what_could_begin_a_stop_text_is_held_back_only_as_long_as_it_could():
    pieces = list(text_pieces(iter(b"a##b#"), decode, ["###"]))
    assert pieces == ["a", "##b", "#"]


def test_the_first_of_two_stop_texts_counts():
    assert "".join(text_pieces(iter(b"one. two; three"), decode, [";", "."])) == "one"


def test_bytes_that_never_become_a_character_do_not_hold_up_the_rest():
    stream = text_pieces(iter(b"\xff\xff\xffok"), decode)
    assert next(stream) == "\ufffd"
    assert "".join(stream) == "\ufffd\ufffdok"
