from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llava_scale.config import ModelConfig
from llava_scale.errors import ConfigError
from llava_scale.model import build_model
from llava_scale.model.presets import tiny_tokenizer
from llava_scale.serving.decoding import _attention
from llava_scale.serving.engine import Engine, GenerationRequest
from llava_scale.serving.prompts import decode_pictures
from llava_scale.serving.sampling import Sampling
from llava_scale.types import Turn
from tests.model.parts import save_tower

QUESTIONS = ["hello", "what color is the large shape at the left of the picture?", "count", "which is it? or is it?"]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def ask(text, *pictures):
    return GenerationRequest(turns=(Turn("user", text),), media={"image": pictures})


def answer_to(engine, request, max_new_tokens=10, **options):
    return engine.answer(engine.prompt(request, max_new_tokens), max_new_tokens, Sampling(), **options)


def by_transformers(engine, request, max_new_tokens):
    """New ids of one request, by ``generate`` of transformers and nothing of ours."""
    prompt = engine.prompt(request, max_new_tokens)
    pixels = decode_pictures(prompt, engine.processor)
    media = {"pixel_values": torch.stack(pixels)} if pixels else {}
    ends = list(engine.processor.chat_encoder.eos_ids)
    ids = engine.model.generate(
        input_ids=torch.tensor([prompt.input_ids]),
        attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=engine.processor.tokenizer.pad_token_id,
        **media,
    )[0, len(prompt.input_ids) :].tolist()
    return ids[:-1] if ids[-1] in ends else ids


def run(decoder, answers):
    while not all(answer.finish for answer in answers):
        decoder.step()


@pytest.fixture
def requests(png):
    pictures = [png("red"), png("blue"), png("green")]
    some = [ask(question, *pictures[: number % 3]) for number, question in enumerate(QUESTIONS * 3)]
    return [ask(f"<image> <image> {r.turns[0].text}", *r.media["image"]) if len(r.media["image"]) == 2 else r
            for r in some]  # fmt: skip


def test_answers_are_those_of_transformers_one_by_one(engine, requests):
    expected = [by_transformers(engine, request, 12) for request in requests]
    assert len({tuple(ids) for ids in expected}) > 8
    decoder = engine.decoder(5)
    answers = [answer_to(engine, request, 12) for request in requests]
    for answer in answers:
        decoder.add(answer)
    run(decoder, answers)
    assert [answer.new_ids for answer in answers] == expected


def test_answers_join_and_leave_while_others_run(engine, requests):
    lengths = [3, 17, 1, 9, 5, 12, 2, 8, 4, 15, 6, 7]
    expected = [by_transformers(engine, request, n) for request, n in zip(requests, lengths, strict=True)]
    decoder, answers, sizes = engine.decoder(4), [], set()
    for request, length in zip(requests, lengths, strict=True):
        answers.append(answer_to(engine, request, length))
        decoder.add(answers[-1])
        decoder.step()
        sizes.add(decoder.num_running)
    run(decoder, answers)
    assert len(sizes) > 2
    assert max(sizes) <= 4
    assert [answer.new_ids for answer in answers] == expected
    assert {answer.finish for answer in answers} <= {"length", "stop"}


def test_a_cancelled_answer_frees_its_place_and_disturbs_nobody(engine, requests):
    decoder = engine.decoder(2)
    first, second, third = (answer_to(engine, request, 12) for request in requests[:3])
    for answer in (first, second, third):
        decoder.add(answer)
    decoder.step()
    decoder.step()
    assert (decoder.num_running, decoder.num_waiting) == (2, 1)
    decoder.cancel(first)
    run(decoder, [second, third])
    assert first.finish == "cancelled"
    assert second.new_ids == by_transformers(engine, requests[1], 12)
    assert third.new_ids == by_transformers(engine, requests[2], 12)
    decoder.cancel(third)
    assert third.finish != "cancelled"


def test_a_waiting_answer_can_be_cancelled(engine, requests):
    decoder = engine.decoder(1)
    first, second = (answer_to(engine, request, 4) for request in requests[:2])
    decoder.add(first)
    decoder.add(second)
    decoder.step()
    decoder.cancel(second)
    run(decoder, [first, second])
    assert (second.finish, second.new_ids) == ("cancelled", [])


def test_a_prompt_that_breaks_the_model_fails_alone(engine, requests):
    decoder = engine.decoder(4)
    answers = [answer_to(engine, request, 5) for request in requests[:3]]
    answers[1].inputs = lambda first: {"pixel_values": torch.zeros(1, 3, 1, 1, dtype=torch.uint8)}
    for answer in answers:
        decoder.add(answer)
    run(decoder, answers)
    assert [answer.finish == "error" for answer in answers] == [False, True, False]
    assert answers[1].error is not None
    assert answers[2].new_ids == by_transformers(engine, requests[2], 5)


def test_a_failing_step_ends_all_answers_and_leaves_the_batch_usable(engine, requests):
    decoder = engine.decoder(4)
    answers = [answer_to(engine, request, 5) for request in requests[:3]]
    for answer in answers:
        decoder.add(answer)
    decoder.step()
    error = RuntimeError("no memory")
    assert decoder.fail(error) == answers
    assert {answer.error for answer in answers} == {error}
    again = answer_to(engine, requests[0], 5)
    decoder.add(again)
    run(decoder, [again])
    assert again.new_ids == by_transformers(engine, requests[0], 5)


def test_a_second_turn_reads_only_what_is_new(engine, png):
    first = answer_to(engine, ask("<image> what color is it?", png("red")), 1, keep=True)
    run_alone(engine, first)
    said = engine.decode(first.new_ids).strip()
    turns = (Turn("user", "<image> what color is it?"), Turn("assistant", said), Turn("user", "and the shape?"))
    request = GenerationRequest(turns=turns, media={"image": [png("red")]})
    second = answer_to(engine, request, 10, start=first.kept, keep=True)
    run_alone(engine, second)
    assert first.num_prefilled == len(first.prompt.input_ids)
    assert second.num_prefilled <= len(second.prompt.input_ids) - len(first.prompt.input_ids)
    assert second.new_ids == by_transformers(engine, request, 10)
    assert len(second.kept.signature) == len(second.prompt.input_ids) + len(second.new_ids) - 1


def run_alone(engine, answer):
    decoder = engine.decoder(1)
    decoder.add(answer)
    run(decoder, [answer])


@pytest.mark.parametrize(("other", "shared"), [("blue", False), ("red", True)])
def test_what_is_kept_counts_only_as_far_as_pictures_are_the_same(engine, png, other, shared):
    first = answer_to(engine, ask("what is it?", png("red")), 3, keep=True)
    run_alone(engine, first)
    request = ask("what else?", png(other))
    second = answer_to(engine, request, 8, start=first.kept)
    run_alone(engine, second)
    num_tokens = len(second.prompt.input_ids)
    ((start, count),) = second.prompt.media_spans
    assert num_tokens - second.num_prefilled >= start + count if shared else num_tokens - second.num_prefilled == start
    assert second.new_ids == by_transformers(engine, request, 8)


def test_a_repeated_conversation_still_reads_its_last_token(engine):
    first = answer_to(engine, ask("hello"), 6, keep=True)
    run_alone(engine, first)
    second = answer_to(engine, ask("hello"), 6, start=first.kept)
    run_alone(engine, second)
    assert second.num_prefilled == 1
    assert second.new_ids == first.new_ids


def small_engine(folder, model_class, config):
    tokenizer = tiny_tokenizer()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(5)
    model_class(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    parts = ModelConfig(language_model=str(folder / "text"), vision_tower=save_tower(folder / "tower"))
    model, processor = build_model(parts, chat_template="native", seed=3)
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if parameter.ndim == 2 and "embed_tokens" not in name:
                parameter.mul_(8.0)
    return Engine(model, processor)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=6)),
        (Qwen2ForCausalLM, Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    ],
)
def test_sliding_windows_are_kept_for_every_row(tmp_path, model_class, config):
    engine = small_engine(tmp_path, model_class, config)
    requests = [ask(question) for question in QUESTIONS]
    expected = [by_transformers(engine, request, 12) for request in requests]
    assert len({tuple(ids) for ids in expected}) > 2
    answers = [answer_to(engine, request, 12) for request in requests]
    decoder = engine.decoder(3)
    for answer in answers:
        decoder.add(answer)
    run(decoder, answers)
    assert [answer.new_ids for answer in answers] == expected


def test_layers_that_keep_no_keys_and_values_are_refused():
    config = MistralConfig(**SMALL)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="cannot be batched with linear_attention layers"):
        _attention(config)
    other = MistralConfig(**SMALL)
    other._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match="attn_implementation=flex_attention"):
        _attention(other)


def test_the_checkpoints_own_score_settings_hold(engine, requests, monkeypatch):
    plain = by_transformers(engine, requests[1], 12)
    monkeypatch.setattr(engine.model.generation_config, "suppress_tokens", plain[1:3])
    monkeypatch.setattr(engine.model.generation_config, "repetition_penalty", 1.3)
    expected = [by_transformers(engine, request, 12) for request in requests[:3]]
    assert expected[1] != plain
    answers = [answer_to(engine, request, 12) for request in requests[:3]]
    decoder = engine.decoder(3)
    for answer in answers:
        decoder.add(answer)
    run(decoder, answers)
    assert [answer.new_ids for answer in answers] == expected
