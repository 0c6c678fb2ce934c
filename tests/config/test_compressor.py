from __future__ import annotations

import pytest

from llava_scale.config import load_config, to_dict
from llava_scale.config.load import parse_config
from llava_scale.errors import ConfigError


def compressor(text, *overrides):
    return load_config(None, ["model.preset=tiny", f"model.compressor={text}", *overrides]).model.compressor


@pytest.mark.parametrize(
    "name",
    ["token_merging", "random_prune", "uniform_prune", "divprune", "temporal_prune", "visionzip", "tome", "pool",
     "pixel_shuffle", "qformer", "stc"],
)  # fmt: skip
def test_each_compressor_is_one_line(name):
    assert compressor(f"{{type: {name}}}").type == name


def test_settings_follow_the_type_and_survive_saving():
    config = load_config(None, ["model.preset=tiny", "model.compressor={type: token_merging, window: [2, 3, 3]}"])
    assert config.model.compressor.window == (2, 3, 3)
    assert parse_config(to_dict(config), origin="saved") == config
    changed = compressor("{type: token_merging}", "model.compressor.ratio=0.25")
    assert changed.ratio == 0.25
    assert load_config(None, ["model.preset=tiny"]).model.compressor is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{type: token_merging, ratoi: 0.5}", r"unknown key 'model.compressor.ratoi'; did you mean 'ratio'"),
        ("{type: token_mergin}", r"model.compressor.type: unknown compressor 'token_mergin'; did you mean 'token_mer"),
        ("{ratio: 0.5}", r"model.compressor: say which with a type"),
        ("{type: divprune, ratio: 1.0}", r"model.compressor.ratio: .* less than 1"),
        ("{type: tome, after_projector: true}", r"model.compressor.after_projector: "),
        ("{type: token_merging, legacy: true}", r"legacy drops projected tokens: set after_projector=true"),
        ("{type: token_merging, legacy: true, after_projector: true, mode: prune}", r"mode has no effect under legacy"),
        ("{type: token_merging, legacy: true, after_projector: true, window: [2, 2, 2]}", r"one frame under legacy"),
        ("{type: qformer, legacy: true, num_heads: 2}", r"num_heads has no effect under legacy"),
        ("{type: qformer, legacy: true, num_queries: 1}", r"two queries or more"),
        ("{type: qformer, legacy: true, instruction_tower: ''}", r"legacy needs an instruction_tower"),
    ],
)
def test_what_cannot_be_is_said_at_its_place(text, message):
    with pytest.raises(ConfigError, match=message):
        compressor(text)
