from __future__ import annotations

from llava_scale.serving.streaming import text_pieces


def decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_join_to_the_stripped_text():
    pieces = list(text_pieces(iter(b"  two words  \n"), decode, ()))
    assert "".join(pieces) == "two words"
    assert all(piece for piece in pieces)


def test_characters_of_several_tokens_come_whole():
    pieces = list(text_pieces(iter("né€😀!".encode()), decode, ()))
    assert pieces == ["n", "é", "€", "😀", "!"]


def test_a_character_cut_short_by_the_end_is_not_lost():
    assert "".join(text_pieces(iter("ok €".encode()[:-1]), decode, ())) == "ok �"


def test_nothing_follows_an_end():
    assert "".join(text_pieces(iter(b"yes\x00no"), decode, (0,))) == "yes"


def test_bytes_that_never_become_a_character_do_not_hold_up_the_rest():
    stream = text_pieces(iter(b"\xff\xff\xffok"), decode, ())
    assert next(stream) == "\ufffd"
    assert "".join(stream) == "\ufffd\ufffdok"
