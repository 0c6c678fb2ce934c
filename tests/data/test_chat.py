from __future__ import annotations

import pickle

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llava_scale.data.chat import ChatEncoder
from llava_scale.data.records import parse_record
from llava_scale.errors import ConfigError, SampleError
from llava_scale.types import PLACEHOLDERS, Turn

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rule = '<<SYS>>' + messages[0]['content'].strip() + '<</SYS>>' %}"
    "{% set messages = messages[1:] %}{% else %}{% set rule = '' %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (rule if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim }}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(template: str | None = CHATML, *, bos: bool = False) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: n for n, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *PLACEHOLDERS.values()]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos:
        number = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


ROUNDS = (
    "{% for message in messages %}{{ loop.index ~ '. ' + message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ (messages | length + 1) ~ '. assistant: ' }}{% endif %}"
)
"""Numbers its turns, so it is not made of constant pieces."""
THOUGHTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Writes the last answer unlike earlier ones, as Qwen3 does."""


def make_sentencepiece_tokenizer(*, legacy: bool) -> PreTrainedTokenizerFast:
    """Like Llama's: spaces are part of words and a space is put before each text (legacy) or the first only."""
    letters = sorted({*"▁ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz:.,?'<>|_\n"})
    vocab = {symbol: n for n, symbol in enumerate(["<unk>", *letters])}
    merges = []
    for word in ("▁cat", "▁A", "▁ASSISTANT:", "▁USER:", "▁red", "▁Red"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *PLACEHOLDERS.values()]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    number = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


DIALOGUE = (
    Turn("user", "<image>\nWhat is it?"),
    Turn("assistant", "A cat."),
    Turn("user", "And its colour?"),
    Turn("assistant", "Red."),
)
CASES = [
    ("plain", CHATML, False),
    ("plain", CHATML, True),
    ("vicuna_v1", None, True),
    ("vicuna_v1", None, False),
    ("native", CHATML, False),
    ("native", LLAMA2, True),
    ("native", STRICT, True),
    ("native", ROUNDS, True),
    ("native", THOUGHTS, False),
]


@pytest.mark.parametrize(("name", "template", "bos"), CASES)
def test_generation_sees_the_ids_that_training_saw(name, template, bos):
    encoder = ChatEncoder(make_tokenizer(template, bos=bos), name)
    whole = encoder.encode(DIALOGUE)
    for seen in (1, 3):
        prompt = encoder.encode_prompt(DIALOGUE[:seen])
        assert whole.input_ids[: len(prompt)] == prompt
        assert whole.supervised[len(prompt)]
        # under plain a later caption follows the one before with nothing in between
        assert whole.supervised[len(prompt) - 1] == (name == "plain" and seen == 3)


@pytest.mark.parametrize(("name", "template", "bos"), CASES)
def test_supervised_tokens_are_the_answers_and_their_end(name, template, bos):
    tokenizer = make_tokenizer(template, bos=bos)
    encoder = ChatEncoder(tokenizer, name)
    whole = encoder.encode(DIALOGUE)
    text = tokenizer.decode([i for i, on in zip(whole.input_ids, whole.supervised, strict=True) if on])
    end = {"plain": "\n", "vicuna_v1": "</s>", "native": "<|im_end|>"}[name]
    if name == "native" and template in (LLAMA2, ROUNDS):
        end = " </s>" if template == LLAMA2 else "</s>"
    lead = " " if name == "vicuna_v1" or (template == LLAMA2 and name == "native") else ""
    assert text == f"{lead}A cat.{end}{lead}Red.{end}"
    ends = [i for i, on in zip(whole.input_ids, whole.supervised, strict=True) if on]
    assert ends[-1] in encoder.eos_ids


@pytest.mark.parametrize(("name", "template", "bos"), CASES)
@pytest.mark.parametrize("turns", [1, 3])
def test_the_stored_template_renders_the_same_prompt_from_strings_and_from_parts(name, template, bos, turns):
    tokenizer = make_tokenizer(template, bos=bos)
    encoder = ChatEncoder(tokenizer, name)
    strings = [{"role": turn.role, "content": turn.text} for turn in DIALOGUE[:turns]]
    parts = [dict(message) for message in strings]
    parts[0]["content"] = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    wanted = encoder.render_prompt(DIALOGUE[:turns])
    for messages in (strings, parts):
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=encoder.jinja, tokenize=False, add_generation_prompt=True
        )
        assert rendered == wanted


def test_media_given_as_parts_stand_on_lines_of_their_own_as_in_samples_without_places():
    tokenizer = make_tokenizer()
    encoder = ChatEncoder(tokenizer, "native")
    content = [{"type": "video"}, {"type": "audio"}, {"type": "text", "text": "\nwhich one?"}, {"type": "image"}]
    sample = {"conversations": [{"from": "human", "value": "which one?"}, {"from": "gpt", "value": "it"}]}
    turn = parse_record(sample, {"video": 1, "audio": 1})[0]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=encoder.jinja, tokenize=False, add_generation_prompt=True
    )
    assert rendered == encoder.render_prompt([Turn("user", f"{turn.text}<image>")])


def test_plain_keeps_only_the_placeholders_of_the_human_turn():
    encoder = ChatEncoder(make_tokenizer(), "plain")
    turns = (Turn("system", "Be kind."), Turn("user", "<image>\nDescribe <image>"), Turn("assistant", " Two cats. "))
    assert encoder.render_prompt(turns[:2]) == "<image><image>"
    assert encoder._tokenizer.decode(encoder.encode(turns).input_ids) == "<image><image>Two cats.\n"


def test_vicuna_is_the_conversation_of_llava():
    encoder = ChatEncoder(make_tokenizer(None, bos=True), "vicuna_v1")
    assert encoder.render_prompt(DIALOGUE[:3]) == (
        "<s>A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"
        "USER: And its colour? ASSISTANT:"
    )


def test_an_explicit_system_turn_replaces_the_default_one():
    for name, template in (("native", CHATML), ("vicuna_v1", None)):
        encoder = ChatEncoder(make_tokenizer(template), name)
        text = encoder.render_prompt([Turn("system", "Be brief."), *DIALOGUE[:1]])
        assert "Be brief." in text
        assert "You are kind." not in text
        assert "A chat between" not in text


def test_a_placeholder_is_one_id_and_never_supervised():
    encoder = ChatEncoder(make_tokenizer(), "native")
    marker = encoder.placeholder_ids["image"]
    turns = (Turn("user", "<image>Draw it"), Turn("assistant", "Here: <image>"))
    encoded = encoder.encode(turns)
    assert encoded.input_ids.count(marker) == 2
    assert not any(on for i, on in zip(encoded.input_ids, encoded.supervised, strict=True) if i == marker)


def test_constant_pieces_are_found_where_the_template_has_them():
    assert ChatEncoder(make_tokenizer(CHATML), "native")._pieces is not None
    assert ChatEncoder(make_tokenizer(STRICT, bos=True), "native")._pieces is not None
    assert ChatEncoder(make_tokenizer(LLAMA2, bos=True), "native")._pieces is not None
    assert ChatEncoder(make_tokenizer(THOUGHTS), "native")._pieces is not None
    assert ChatEncoder(make_tokenizer(ROUNDS), "native")._pieces is None


def test_an_encoder_survives_pickling_and_keeps_its_fingerprint():
    encoder = ChatEncoder(make_tokenizer(), "native")
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.fingerprint() == encoder.fingerprint()
    assert copy.encode(DIALOGUE) == encoder.encode(DIALOGUE)
    assert ChatEncoder(make_tokenizer(), "plain").fingerprint() != encoder.fingerprint()


def test_unusable_templates_and_tokenizers_are_refused():
    with pytest.raises(ConfigError, match="unknown chat_template 'vicuna'; did you mean 'vicuna_v1'"):
        ChatEncoder(make_tokenizer(), "vicuna")
    with pytest.raises(ConfigError, match="no chat template; use 'vicuna_v1' or 'plain'"):
        ChatEncoder(make_tokenizer(None), "native")
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])), eos_token="a")
    with pytest.raises(ConfigError, match=r"cannot be used \(the chat template changes the text of answers"):
        ChatEncoder(make_tokenizer(ROUNDS.replace("message['content']", "message['content'] | upper")), "native")
    with pytest.raises(ConfigError, match="puts nothing behind an answer"):
        ChatEncoder(make_tokenizer("{% for message in messages %}{{ message['content'] }}{% endfor %}"), "native")
    with pytest.raises(ConfigError, match="cannot be used"):
        ChatEncoder(make_tokenizer("{{ messages[0]['nothing']['here'] }}"), "native")
    with pytest.raises(ConfigError, match="has no token '<image>'"):
        ChatEncoder(bare, "plain")


def test_conversations_that_a_template_cannot_hold_are_sample_errors():
    encoder = ChatEncoder(make_tokenizer(), "native")
    with pytest.raises(SampleError, match="no assistant turn"):
        encoder.encode(DIALOGUE[:1])
    with pytest.raises(SampleError, match="two human turns in a row"):
        encoder.encode([Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")])
    with pytest.raises(SampleError, match="two answers in a row"):
        encoder.encode([*DIALOGUE, Turn("assistant", "c")])
    with pytest.raises(SampleError, match="system turn must come first"):
        encoder.encode([*DIALOGUE[:2], Turn("system", "s"), *DIALOGUE[2:]])
    with pytest.raises(SampleError, match="no human turn before the answer"):
        encoder.encode([Turn("system", "s"), Turn("assistant", "c")])
    with pytest.raises(SampleError, match="takes no system turn"):
        ChatEncoder(make_tokenizer(STRICT, bos=True), "native").encode([Turn("system", "s"), *DIALOGUE])


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["plain", "vicuna_v1", "native"])
def test_units_of_a_space_adding_tokenizer_join_as_the_whole_text_would(name, legacy):
    tokenizer = make_sentencepiece_tokenizer(legacy=legacy)
    encoder = ChatEncoder(tokenizer, name)
    encoded = encoder.encode(DIALOGUE)
    text = encoder.render_prompt(DIALOGUE[:3])
    assert encoder.encode_prompt(DIALOGUE[:3]) == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert encoded.input_ids[: len(encoder.encode_prompt(DIALOGUE[:3]))] == encoder.encode_prompt(DIALOGUE[:3])
    assert tokenizer.unk_token_id not in encoded.input_ids


def test_vicuna_answers_keep_their_words_on_a_space_adding_tokenizer():
    tokenizer = make_sentencepiece_tokenizer(legacy=True)
    encoded = ChatEncoder(tokenizer, "vicuna_v1").encode(DIALOGUE)
    answers = [i for i, on in zip(encoded.input_ids, encoded.supervised, strict=True) if on]
    assert tokenizer.convert_ids_to_tokens(answers) == ["▁A", "▁cat", ".", "</s>", "▁Red", ".", "</s>"]


def test_limits_left_behind_by_another_call_of_the_tokenizer_change_nothing():
    tokenizer = make_tokenizer()
    encoder = ChatEncoder(tokenizer, "native")
    wanted = encoder.encode(DIALOGUE)
    tokenizer("a long text", truncation=True, max_length=3, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation is not None
    assert encoder.encode(DIALOGUE) == wanted
    tokenizer("a long text", truncation=True, max_length=3, padding="max_length")
    assert ChatEncoder(tokenizer, "native").fingerprint() == ChatEncoder(make_tokenizer(), "native").fingerprint()


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day():
    template = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}" + CHATML
    encoder = ChatEncoder(make_tokenizer(template), "native")
    assert encoder.render_prompt(DIALOGUE[:1]).startswith("26 Jul 2024<|im_start|>")
    again = ChatEncoder(make_tokenizer(template), "native")
    assert again.encode(DIALOGUE) == encoder.encode(DIALOGUE)
    assert again._pieces is not None


def test_padding_with_the_end_token_leaves_the_end_supervised():
    tokenizer = make_tokenizer(None, bos=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoded = ChatEncoder(tokenizer, "vicuna_v1").encode(DIALOGUE)
    ends = [on for i, on in zip(encoded.input_ids, encoded.supervised, strict=True) if i == tokenizer.eos_token_id]
    assert ends == [True, True]


@pytest.mark.parametrize(("name", "template", "bos"), CASES)
def test_remembered_openings_change_no_id(name, template, bos):
    encoder = ChatEncoder(make_tokenizer(template, bos=bos), name)
    wanted = encoder.encode(DIALOGUE)
    assert bool(encoder._openings) == (template != ROUNDS)
    encoder._openings = {}
    assert encoder.encode(DIALOGUE) == wanted


def test_placeholders_that_swallow_white_space_are_tokenised_with_their_surroundings():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False, rstrip=True)])
    encoder = ChatEncoder(tokenizer, "native")
    text = encoder.render_prompt(DIALOGUE[:1])
    assert encoder.encode_prompt(DIALOGUE[:1]) == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("tokenizer", [make_tokenizer(), make_sentencepiece_tokenizer(legacy=True)])
def test_the_texts_of_the_tokens_join_to_the_prompt(tokenizer):
    encoder = ChatEncoder(tokenizer, "plain" if tokenizer.bos_token else "native")
    ids = encoder.encode_prompt(DIALOGUE[:3])
    texts = encoder.token_texts(ids)
    assert len(texts) == len(ids)
    joined = "".join(texts).replace(" A cat", "A cat") if tokenizer.bos_token else "".join(texts)
    assert joined == encoder.render_prompt(DIALOGUE[:3])


def test_a_character_of_several_tokens_is_shown_once():
    encoder = ChatEncoder(make_tokenizer(), "native")
    ids = encoder._encode("é🙂x")
    assert encoder.token_texts(ids) == ["", "é", "", "", "", "🙂", "x"]
    assert encoder.token_texts(ids[:3])[:2] == ["", "é"]
