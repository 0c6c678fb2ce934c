from __future__ import annotations

import pytest
import yaml

from llava_scale.cli import build_app
from llava_scale.errors import ConfigError


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": {"preset": "tiny"}, "data": {"packing": {"row_length": 512}}}))
    return path


def call(*arguments):
    return build_app()(["estimate", *map(str, arguments)], standalone_mode=False) or 0


def test_a_recipe_becomes_memory_and_hours_without_any_data(recipe, capsys):
    call(recipe, "train.rows_per_step=8", "--devices", 8, "--samples", 100_000)
    shown = capsys.readouterr().out
    assert "language_model" in shown
    assert "GiB a process = " in shown
    assert "hours on 8 x H100 at 40% of the peak" in shown


def test_what_is_missing_is_named(recipe):
    with pytest.raises(ConfigError, match="the length of the run is not known"):
        call(recipe)
    with pytest.raises(ConfigError, match=r"the peak of 'abacus' is not known.*--tflops"):
        call(recipe, "--device", "abacus", "--samples", 10)
    with pytest.raises(ConfigError, match=r"rows_per_step=1 cannot be divided among 8 devices"):
        call(recipe, "--devices", 8, "--samples", 10)
