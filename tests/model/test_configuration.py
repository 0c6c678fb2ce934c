from __future__ import annotations

import pytest
from transformers import AutoConfig, LlamaConfig, SiglipVisionConfig

from llava_scale.errors import ConfigError
from llava_scale.model import CustomVisionConfig, LlavaScaleConfig


def test_a_saved_config_comes_back_equal(tmp_path):
    config = LlavaScaleConfig(
        vision_config=SiglipVisionConfig(hidden_size=8, image_size=32),
        text_config=LlamaConfig(hidden_size=64, tie_word_embeddings=True),
        projector={"type": "linear"},
        vision_feature_layer=-1,
        image_mean=(0.1, 0.2, 0.3),
        image_token_id=7,
        chat_template_name="plain",
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LlavaScaleConfig)
    ours, theirs = config.to_dict(), loaded.to_dict()
    written_on_saving = {"_name_or_path", "transformers_version"}
    assert {key: theirs[key] for key in ours.keys() - written_on_saving} == {
        key: ours[key] for key in ours.keys() - written_on_saving
    }
    assert isinstance(loaded.vision_config, SiglipVisionConfig)
    assert loaded.image_size == 32
    assert loaded.tie_word_embeddings
    assert loaded.get_text_config() is loaded.text_config


def test_a_tower_by_import_path_is_kept_by_name_and_arguments(tmp_path):
    LlavaScaleConfig(
        vision_config=CustomVisionConfig(import_path="mine:Tower", arguments={"depth": 2}), image_size=48
    ).save_pretrained(tmp_path)
    vision = AutoConfig.from_pretrained(tmp_path).vision_config
    assert (vision.import_path, vision.arguments) == ("mine:Tower", {"depth": 2})


@pytest.mark.parametrize("field", ["vision_feature_select", "image_aspect_ratio"])
def test_a_choice_that_does_not_exist_is_refused(field):
    with pytest.raises(ConfigError, match=f"{field} must be one of"):
        LlavaScaleConfig(**{field: "crop"})
