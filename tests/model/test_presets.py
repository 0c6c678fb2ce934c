from __future__ import annotations

from hypothesis import given, settings
from hypothesis.strategies import text

from llava_scale.data.chat import ChatEncoder
from llava_scale.model.build import add_placeholders
from llava_scale.model.presets import WORDS, tiny_text_config, tiny_tokenizer
from llava_scale.types import Turn

TOKENIZER = tiny_tokenizer()


def test_the_words_of_the_toy_data_are_one_token_each():
    for word in WORDS.split():
        for spelling in (word, f" {word}", word.capitalize()):
            assert len(TOKENIZER(spelling, add_special_tokens=False)["input_ids"]) == 1, spelling


@given(text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(sample):
    assert TOKENIZER.decode(TOKENIZER(sample, add_special_tokens=False)["input_ids"]) == sample


def test_the_tokenizer_is_the_same_every_time():
    assert tiny_tokenizer().get_vocab() == TOKENIZER.get_vocab()


def test_an_answer_is_supervised_with_its_end():
    tokenizer = tiny_tokenizer()
    add_placeholders(tokenizer)
    encoded = ChatEncoder(tokenizer, "native").encode([Turn("user", "<image>\nwhat color ?"), Turn("assistant", "red")])
    supervised = [i for i, flag in zip(encoded.input_ids, encoded.supervised, strict=True) if flag]
    assert tokenizer.decode(supervised) == "red<|end|>"


def test_the_vocabulary_has_room_for_the_placeholders():
    assert tiny_text_config(len(TOKENIZER) + 3).vocab_size % 64 == 0
