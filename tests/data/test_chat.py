from __future__ import annotations

import pickle

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llava_scale.data.chat import ChatEncoder
from llava_scale.errors import ConfigError, SampleError
from llava_scale.types import PLACEHOLDERS, Turn

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rule = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}"
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
    if template == LLAMA2 and name == "native":
        end = " </s>"
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
    with pytest.raises(ConfigError, match="has no token '<image>'"):
        ChatEncoder(bare, "plain")


def test_conversations_that_a_template_cannot_hold_are_sample_errors():
    encoder = ChatEncoder(make_tokenizer(), "native")
    with pytest.raises(SampleError, match="no assistant turn"):
        encoder.encode(DIALOGUE[:1])
    with pytest.raises(SampleError, match="two human turns in a row"):
        encoder.encode([Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")])
    with pytest.raises(SampleError, match="takes no system turn"):
        ChatEncoder(make_tokenizer(STRICT, bos=True), "native").encode([Turn("system", "s"), *DIALOGUE])
