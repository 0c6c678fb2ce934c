from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.model.presets import tiny_tokenizer
from llava_scale.towers.instruction import (
    InstructionTower,
    encode_questions,
    instruction_config_of,
    instruction_tokenizer_of,
    load_instruction_model,
    longest_question,
)

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = CLIPTextConfig(**SIZES, vocab_size=1024, bos_token_id=0, eos_token_id=1, max_position_embeddings=20)
BERT = BertConfig(**SIZES, vocab_size=1024, max_position_embeddings=64)


def tower(config=CLIP):
    torch.manual_seed(0)
    return InstructionTower(config).eval()


@pytest.mark.parametrize("config", [CLIP, BERT], ids=["clip", "bert"])
def test_features_do_not_depend_on_padding_or_neighbours(config):
    encoder = tower(config)
    tokenizer = tiny_tokenizer()
    together = encode_questions(tokenizer, ["what color is it", "how many", ""], 20)
    alone = encode_questions(tokenizer, ["how many"], 20)
    with torch.no_grad():
        features, single = encoder(*together), encoder(*alone)
    assert features.shape == (3, 16, 16)
    seen = together[1][1]
    torch.testing.assert_close(features[1][seen], single[0][alone[1][0]])
    assert torch.isfinite(features).all()


def test_no_parameter_is_out_of_reach_of_the_gradient():
    encoder = tower(BERT)
    encoder(*encode_questions(tiny_tokenizer(), ["what color"], 20)).sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_questions_become_ids_and_masks_of_few_widths():
    tokenizer = tiny_tokenizer()
    ids, mask = encode_questions(tokenizer, ["what color is it", "", "how many"], 64)
    assert ids.shape == mask.shape == (3, 16)
    assert mask.sum(1).tolist() == [len(tokenizer("what color is it")["input_ids"]), 0, 2]
    assert (ids[~mask] == tokenizer.pad_token_id).all()
    assert encode_questions(tokenizer, ["", ""], 64)[0].shape == (2, 1)
    assert encode_questions(tokenizer, ["what color is it"], 3)[1].tolist() == [[True, True, True]]


def test_the_limit_is_the_encoders_or_the_tokenizers():
    tokenizer = tiny_tokenizer()
    assert longest_question(tokenizer, CLIP) == 20
    tokenizer.model_max_length = 8
    assert longest_question(tokenizer, CLIP) == 8
    tokenizer.model_max_length = 10**30
    assert longest_question(tokenizer, BERT) == 64


@pytest.mark.parametrize("saved", ["text", "both"])
def test_clips_text_part_is_found_with_its_weights(tmp_path, saved):
    torch.manual_seed(0)
    if saved == "text":
        model = CLIPTextModel(CLIP)
        text = model
    else:
        vision = {**SIZES, "image_size": 16, "patch_size": 8}
        model = CLIPModel(CLIPConfig(text_config=CLIP.to_dict(), vision_config=vision))
        text = model.text_model
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = instruction_config_of(str(tmp_path))
    loaded = InstructionTower(config, model=load_instruction_model(str(tmp_path), config, torch.float32)).eval()
    encoded = encode_questions(instruction_tokenizer_of(str(tmp_path)), ["what color"], 20)
    text.eval()
    with torch.no_grad():
        expected = text(input_ids=encoded[0], attention_mask=encoded[1].long()).last_hidden_state
        torch.testing.assert_close(loaded(*encoded), expected)


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.instruction_tower"):
        instruction_config_of(str(tmp_path))
    with pytest.raises(ConfigError, match=r"tokenizer of model\.instruction_tower"):
        instruction_tokenizer_of(str(tmp_path))
    BertModel(BERT).save_pretrained(tmp_path)
    deeper = BertConfig(**{**SIZES, "num_hidden_layers": 3}, vocab_size=1024, max_position_embeddings=64)
    with pytest.raises(CheckpointError, match="lacks"):
        load_instruction_model(str(tmp_path), deeper, torch.float32)
