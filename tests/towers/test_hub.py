from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, CLIPConfig, CLIPModel, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.towers import TransformersVisionTower
from llava_scale.towers.hub import (
    HALF,
    OPENAI,
    check_cut,
    load_vision_model,
    read_image_stats,
    vision_config_of,
    whole_features,
)

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.fixture
def clip_folder(tmp_path):
    text = {k: v for k, v in SMALL.items() if "size" in k and "image" not in k and "patch" not in k}
    config = CLIPConfig(
        text_config={
            **text,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 20,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config=SMALL,
    )
    model = CLIPModel(config)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_the_vision_part_of_a_text_and_image_model_is_loaded(clip_folder):
    folder, whole = clip_folder
    config = vision_config_of(str(folder))
    assert config.model_type == "clip_vision_model"
    model = load_vision_model(str(folder), config, torch.float32)
    weights = whole.vision_model.state_dict()
    assert weights
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_missing_weight_is_an_error(tmp_path):
    model = SiglipVisionModel(SiglipVisionConfig(**SMALL))
    weights = {name: value for name, value in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(CheckpointError, match="lacks 4 weights"):
        load_vision_model(str(tmp_path), vision_config_of(str(tmp_path)), torch.float32)


def test_a_name_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        vision_config_of(str(tmp_path / "nothing"))


def test_picture_statistics_come_from_the_checkpoint_or_its_family(clip_folder, tmp_path):
    folder, _ = clip_folder
    config = vision_config_of(str(folder))
    assert read_image_stats(str(folder), config) == OPENAI
    assert read_image_stats(str(folder), SiglipVisionConfig()) == HALF
    stats = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": stats}))
    assert read_image_stats(str(folder), config) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (folder / "preprocessor_config.json").write_text(json.dumps({**stats, "image_mean": [0.9, 0.9, 0.9]}))
    assert read_image_stats(str(folder), config) == ((0.9, 0.9, 0.9), (0.4, 0.5, 0.6))


def test_a_cut_that_changes_features_is_refused(tmp_path):
    model = ViTModel(ViTConfig(**SMALL))
    expected = whole_features(model, -2, 16)
    tower = TransformersVisionTower(
        AutoConfig.for_model("vit", **SMALL),
        feature_layer=-2,
        image_size=16,
        image_mean=(0, 0, 0),
        image_std=(1, 1, 1),
        feature_select="patch",
        model=model,
    )
    check_cut(tower.eval(), expected)
    with pytest.raises(ConfigError, match="without changing its features"):
        check_cut(tower, expected + 1)
