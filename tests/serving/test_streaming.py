from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

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
    stream = text_pieces(iter(b"\xff\xff\xff\xff\xffok"), decode)
    assert next(stream) == "\ufffd" * 3
    assert "".join(stream) == "\ufffd\ufffdok"


def sentence_pieces():
    """Decoder of Llama's kind: space before words, bytes as tokens, one space less at the beginning."""
    words = ["▁", "▁a", "a", "b", "▁▁", ".", "▁é", "<s>", *(f"<0x{byte:02X}>" for byte in (*"€é".encode(), 0x41, 0xFF))]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


PIECES = sentence_pieces()
IDS = PIECES.get_vocab()
CHARACTERS_BY_TEXT = {text: [IDS[f"<0x{byte:02X}>"] for byte in text.encode()] for text in "€é"}
bytes_ = st.tuples(st.just(decode), st.lists(st.sampled_from([[byte] for byte in [*"a €é😀\n".encode(), 0xFF]])))
groups = [*([number] for text, number in IDS.items() if not text.startswith("<0x")), *CHARACTERS_BY_TEXT.values()]
pieces_ = st.tuples(st.just(PIECES.decode), st.lists(st.sampled_from(groups)))


@given(st.one_of(bytes_, pieces_))
def test_what_was_given_is_the_beginning_of_the_text_of_all_tokens(case):
    decode_ids, ids = case[0], [number for group in case[1] for number in group]
    stream, text, whole = TextStream(decode_ids), "", decode_ids(ids).strip()
    for number in ids:
        text += stream.push(number)
        assert whole.startswith(text)
    assert text + stream.end() == whole


def test_characters_that_a_decoder_writes_byte_by_byte_come_whole():
    ids = [number for text in "€é€" for number in CHARACTERS_BY_TEXT[text]]
    assert PIECES.decode(ids[:2]) == "\ufffd\ufffd"
    assert list(text_pieces(iter(ids), PIECES.decode)) == ["€", "é", "€"]


def test_a_long_answer_costs_no_more_for_each_token():
    counts = []

    def counting(ids):
        counts.append(len(ids))
        return decode(ids)

    stream = TextStream(counting)
    for number in "naïve € ".encode() * 100:
        stream.push(number)
    assert max(counts) <= 8
