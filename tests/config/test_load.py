from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from llava_scale.config import load_config, save_config, to_dict
from llava_scale.config.load import parse_config
from llava_scale.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

MINIMAL = """
model: {preset: tiny}
data:
  sources: [{path: shards}]
train: {learning_rate: 1e-3, steps: 10}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_a_number_in_scientific_notation_is_a_number(recipe):
    assert load_config(recipe).train.learning_rate == 1e-3


def test_overrides_win_and_reach_into_lists(recipe):
    config = load_config(recipe, ["train.steps=7", "data.sources.0.weight=2", "data.packing.mode=samples"])
    assert (config.train.steps, config.data.sources[0].weight, config.data.packing.mode) == (7, 2.0, "samples")


def test_a_saved_config_loads_equal(recipe, tmp_path):
    config = load_config(recipe, ["name=x", "train.adam_betas=[0.9, 0.95]"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert parse_config(to_dict(config), origin="dict") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=3", "unknown key 'train.stpes'; did you mean 'steps'?"),
        ("data.sources.0.pth=a", "unknown key 'data.sources.0.pth'; did you mean 'path'?"),
        ("data.packing.row_lenght=9", "did you mean 'row_length'?"),
        ("colour=red", "known: data, model, name, seed, train"),
        ("train.steps=-1", "train.steps: Input should be greater than or equal to 0, got -1"),
        ("train.steps=many", "train.steps"),
        ("data.packing.mode=rows", "Input should be 'tokens' or 'samples', got 'rows'"),
        ("train.steps", "not of the form key.sub=value"),
        ("train.steps.x=1", "'steps' is a value, not a section"),
        ("data.sources.4.path=a", "'4' is not a position in a list of 1"),
        ("model.vision_tower=clip", "exclude each other"),
        ("model=[1", "the value is not YAML"),
    ],
)
def test_a_wrong_setting_is_named_and_explained(recipe, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(recipe, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "expected a mapping"), ("a: [", "is not YAML"), ("", "set one of init_from, preset")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read config .*nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("text", ["20:23", "1:02:03"])
def test_numbers_with_colons_are_text(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"name: {text}\nmodel: {{preset: tiny}}\n")
    assert load_config(file).name == text
    assert load_config(None, ["model.preset=tiny", f"name={text}"]).name == text


def test_steps_to_profile_are_given_as_they_are_documented() -> None:
    assert load_config(None, ["model.preset=tiny", "train.profile=20:23"]).train.profile == "20:23"
