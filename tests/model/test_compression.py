from __future__ import annotations

import pickle
from functools import cache

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_scale.config import ModelConfig, load_config
from llava_scale.errors import ConfigError, ShapeError
from llava_scale.model import build_model, load_model, row_inputs
from llava_scale.types import IGNORE_INDEX, MediaInfo
from tests.model.parts import packed_row, pictures, save_decoder, save_tower

PICTURE = MediaInfo(kind="image")
RATIO = "ratio: 0.5, warmup_steps: 8"
KINDS = {
    "token_merging": f"{{type: token_merging, {RATIO}}}",
    "token_merging, keys": f"{{type: token_merging, metric: keys, {RATIO}}}",
    "token_merging, after": f"{{type: token_merging, after_projector: true, {RATIO}}}",
    "token_merging, prune": f"{{type: token_merging, mode: prune, {RATIO}}}",
    "random_prune": f"{{type: random_prune, {RATIO}}}",
    "uniform_prune": f"{{type: uniform_prune, {RATIO}}}",
    "divprune": f"{{type: divprune, {RATIO}}}",
    "temporal_prune": f"{{type: temporal_prune, {RATIO}}}",
    "visionzip": f"{{type: visionzip, {RATIO}}}",
    "tome": f"{{type: tome, {RATIO}}}",
    "pool": "{type: pool}",
    "pool, after": "{type: pool, after_projector: true}",
    "pixel_shuffle": "{type: pixel_shuffle}",
    "qformer": "{type: qformer, num_queries: 4}",
    "qformer, no question": "{type: qformer, num_queries: 4, instruction_tower: ''}",
    "stc": "{type: stc, depth: 1, width: 24}",
    "legacy": "{type: qformer, num_queries: 4, legacy: true}",
}
TINY = {name: text for name, text in KINDS.items() if name != "legacy"}


def model_config(text, *overrides):
    base = (
        []
        if any(item.startswith("model.init_from") for item in overrides)
        else ["model.preset=tiny", "model.image_size=72"]
    )
    return load_config(None, [*base, f"model.compressor={text}", *overrides]).model


def build(name, *overrides):
    projector = ["model.projector.type=identity"] if name == "legacy" else []
    return build_model(model_config(KINDS[name], *projector, *overrides), chat_template="native", seed=0)


@cache
def counter_of(name):
    return build(name)[1].token_counter


def row_of(model, processor, *, step, num_pictures=2):
    """Packed row of samples with one picture each, laid out for ``step``."""
    count = processor.token_counter.count(PICTURE, step=step).num_tokens
    samples = []
    for number in range(num_pictures):
        answer = [7 + number, 8, 9]
        ids = [5, *[model.config.image_token_id] * count, *answer]
        samples.append((ids, [IGNORE_INDEX] * (count + 1) + answer))
    return packed_row(
        samples,
        pictures(model, num_pictures),
        image_grids=((1, 3, 3),) * num_pictures,
        image_num_tokens=(count,) * num_pictures,
        instructions=("what color is it", "how many circles")[:num_pictures],
        step=step,
    )


@pytest.mark.parametrize("name", list(KINDS))
def test_training_steps_along_the_ramp_take_the_promised_tokens_and_reach_all_weights(name):
    model, processor = build(name)
    model.train()
    counts = []
    for step in (0, 4, 8, None):
        row = row_of(model, processor, step=step)
        model.zero_grad(set_to_none=True)
        model(**row_inputs(row)).loss.backward()
        counts.append(row.image_num_tokens[0])
        missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert missing == []
        for part in (model.projector, model.compressor):
            for key, parameter in part.named_parameters() if isinstance(part, torch.nn.Module) else ():
                unused = key.startswith(("0.bias", "null_instruction"))
                assert unused or parameter.grad.abs().sum() > 0, key
    assert counts[2] == counts[3] == model.num_visual_tokens()
    if "ratio" in KINDS[name] and name != "temporal_prune":
        assert counts[0] == 9
        assert counts[3] == 5
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("name", list(KINDS))
def test_a_saved_model_gives_the_same_logits_and_counts(name, tmp_path):
    model, processor = build(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, its_processor = load_model(tmp_path)
    assert its_processor.token_counter == processor.token_counter
    inputs = row_inputs(row_of(model, processor, step=None))
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).loss, loaded(**inputs).loss)
    auto, auto_processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    prompt = "<|user|><image>what color is it<|end|><|assistant|>"
    picture = pictures(model, 1)[0]
    batch = auto_processor(text=[prompt, prompt], images=[picture, picture])
    assert ("instruction_ids" in batch) == (auto.instruction_tower is not None)
    with torch.no_grad():
        assert torch.equal(auto.generate(**batch, max_new_tokens=3), loaded.generate(**batch, max_new_tokens=3))
        beams = loaded.generate(**batch, max_new_tokens=3, num_beams=2)
    assert torch.equal(beams[0], beams[1])


@pytest.mark.parametrize("name", list(KINDS))
def test_the_counter_goes_into_loader_workers_without_weights(name):
    counter = counter_of(name)
    packed = pickle.dumps(counter)
    assert len(packed) < 2000
    assert pickle.loads(packed) == counter
    others = [counter_of(other).fingerprint() for other in KINDS if other != name]
    same_counts = {"qformer", "qformer, no question", "legacy"} | {"pool", "pool, after"}
    if name not in same_counts and not name.startswith("token_merging"):
        assert counter.fingerprint() not in others


@pytest.mark.parametrize("name", list(TINY))
def test_clips_take_the_promised_tokens_and_do_not_mix(name):
    model, processor = build(name)
    frames = pictures(model, 5)
    grids = [(2, 3, 3), (3, 3, 3)]
    questions = processor.encode_questions(["what color", "how many"]) if processor.reads_questions else None
    with torch.no_grad():
        both = model.get_video_features(frames, grids, questions=questions)
        second = questions and tuple(value[1:] for value in questions)
        alone = model.get_video_features(frames[2:], questions=second)
    assert [len(tokens) for tokens in both] == [model.num_visual_tokens(2), model.num_visual_tokens(3)]
    torch.testing.assert_close(both[1], alone[0])


def test_clips_in_a_row_are_spliced_and_wrong_grids_refused():
    model, _ = build("token_merging")
    count = model.num_visual_tokens(2)
    ids = [5, *[model.config.video_token_id] * count, 7, 8]
    row = packed_row([(ids, [IGNORE_INDEX] * (count + 1) + [7, 8])], pixel_values_videos=pictures(model, 2),
                     video_grids=((2, 3, 3),), video_num_tokens=(count,))  # fmt: skip
    assert torch.isfinite(model(**row_inputs(row)).loss)
    with pytest.raises(ShapeError, match="of 3 frames were announced"):
        model.get_video_features(pictures(model, 2), [(3, 3, 3)])


def test_a_row_planned_for_another_step_is_refused():
    model, processor = build("token_merging")
    inputs = row_inputs(row_of(model, processor, step=0))
    with pytest.raises(ShapeError, match="make 10 tokens"):
        model(**{**inputs, "step": None})


def test_the_question_reaches_the_picture_tokens():
    model, processor = build("qformer")
    row = row_inputs(row_of(model, processor, step=None))
    asked = model(**row).image_hidden_states
    other = model(**{**row, "instructions": ("how many circles", "how many circles")}).image_hidden_states
    without = model(**{**row, "instructions": None}).image_hidden_states
    assert not torch.allclose(asked[0], other[0])
    assert torch.equal(asked[1], other[1])
    assert not torch.allclose(asked[0], without[0])
    ids, mask = processor.encode_questions(["what color is it", "how many circles"])
    by_ids = model(**{**row, "instructions": None, "instruction_ids": ids, "instruction_mask": mask})
    assert torch.equal(by_ids.image_hidden_states, asked)
    model.question_encoder = None
    with pytest.raises(ConfigError, match="not given their tokenizer"):
        model(**row)


def test_a_text_only_row_touches_compressor_and_instruction_tower():
    model, _ = build("qformer")
    model.train()
    model(**row_inputs(packed_row([([20, 21, 22], [20, 21, 22])]))).loss.backward()
    for part in (model.compressor, model.instruction_tower, model.projector):
        assert all(parameter.grad is not None for parameter in part.parameters())
        assert not any(parameter.grad.any() for parameter in part.parameters())


def test_a_checkpoint_can_be_evaluated_with_another_compressor(tmp_path):
    model, processor = build("token_merging")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for text, count in (("{type: random_prune, ratio: 0.25}", 7), ("{type: pool}", 1)):
        other, its_processor = build_model(
            model_config(text, f"model.init_from={tmp_path}"), chat_template="native", seed=0
        )
        assert other.num_visual_tokens() == its_processor.token_counter.count(PICTURE, step=None).num_tokens == count
        assert other.get_image_features(pictures(other, 1)).shape[1] == count
        assert other.config.compressor["type"] == text[7:].partition(",")[0].rstrip("}")
    with pytest.raises(ConfigError, match="qformer cannot take the place of token_merging"):
        build_model(model_config("{type: qformer}", f"model.init_from={tmp_path}"), chat_template="native", seed=0)


def test_named_towers_take_a_named_reader_of_questions(tmp_path):
    from transformers import BertConfig, BertModel

    from llava_scale.model.build import build_processor
    from llava_scale.model.presets import tiny_tokenizer

    reader = tmp_path / "reader"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=1024, max_position_embeddings=40)).save_pretrained(reader)
    tiny_tokenizer().save_pretrained(reader)
    text = f"{{type: qformer, num_queries: 3, num_heads: 4, instruction_tower: {reader}}}"
    tower, decoder = save_tower(tmp_path / "tower"), save_decoder(tmp_path / "lm")
    named = [f"model.vision_tower={tower}", f"model.language_model={decoder}", f"model.compressor={text}"]
    config = load_config(None, named).model
    model, processor = build_model(config, chat_template="native", seed=0)
    assert model.instruction_tower.hidden_size == 16
    assert processor.question_length == 40
    assert model.get_image_features(pictures(model, 1), questions=processor.encode_questions(["hi"])).shape == (
        1,
        3,
        24,
    )
    alone = build_processor(config, chat_template="native")
    assert alone.token_counter == processor.token_counter
    assert alone.question_length == 40


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("{type: pool}", "model.vision_feature_select=full", "vision_feature_select=patch"),
        ("{type: qformer, num_heads: 7}", "seed=0", "does not divide the width 128"),
    ],
)
def test_what_does_not_fit_together_is_said(text, override, message):
    with pytest.raises(ConfigError, match=message):
        build_model(model_config(text, override), chat_template="native", seed=0)


def test_the_same_seed_gives_the_same_query_weights():
    first, second = build("qformer")[0], build("qformer")[0]
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert ModelConfig(preset="tiny").compressor is None
