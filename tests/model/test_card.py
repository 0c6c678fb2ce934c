from __future__ import annotations

import json

import pytest
import yaml

from llava_scale.config.load import parse_config
from llava_scale.errors import CheckpointError
from llava_scale.model.card import card_of_run, read_card, render_card, write_card


def run_config(tmp_path, **model):
    data = tmp_path / "shards"
    data.mkdir(exist_ok=True)
    (data / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nPictures.\n")
    tree = {"name": "first", "model": model or {"preset": "tiny"}, "data": {"sources": [{"path": str(data)}]}}
    return parse_config(tree, origin="test")


def test_a_card_names_parts_data_settings_results_and_licences(tmp_path):
    config = run_config(tmp_path)
    card = card_of_run(config, steps=1234, results={"loss": 0.51234, "held-out loss": None})
    text = render_card(card)
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "llava-scale"
    assert "# first (" in text
    assert "1,234 optimizer steps; loss 0.5123" in text
    assert "| language model | `tiny preset` | not stated |" in text
    assert f"| `{config.data.sources[0].path}` | 1.0 | cc-by-4.0 |" in text
    assert "preset: tiny" in text


def test_a_stage_that_continues_a_model_continues_its_card(tmp_path):
    write_card(tmp_path, card_of_run(run_config(tmp_path), steps=10, results={}))
    second = card_of_run(run_config(tmp_path, init_from=str(tmp_path)), steps=20, results={"loss": 0.1})
    assert [stage.steps for stage in second.stages] == [10, 20]
    assert second.parts["language model"] == "tiny preset"
    (tmp_path / "next").mkdir()
    write_card(tmp_path / "next", second)
    assert read_card(tmp_path / "next").stages == second.stages


def test_a_card_names_the_ears_where_there_are_any(tmp_path):
    assert "audio tower" not in card_of_run(run_config(tmp_path), steps=1, results={}).parts
    hearing = run_config(tmp_path, preset="tiny", audio_tower="tiny")
    assert "| audio tower | `tiny` | not stated |" in render_card(card_of_run(hearing, steps=1, results={}))


def test_scores_beside_the_run_are_taken_along(tmp_path):
    (tmp_path / "eval").mkdir()
    share = {"value": 0.5, "low": 0.25, "high": 0.75}
    (tmp_path / "eval/eval.json").write_text(json.dumps({"exact_match": {"overall": share}, "loss": 1.25}))
    tasks = {"tasks": [{"name": "vqa", "scores": {"vqa_accuracy": share}}]}
    (tmp_path / "eval/tasks.json").write_text(json.dumps(tasks))
    text = render_card(read_card(tmp_path / "final"))
    assert "| exact match, overall | 0.5 (0.250 to 0.750) |" in text
    assert "| vqa: vqa_accuracy | 0.5 (0.250 to 0.750) |" in text
    assert "| held-out loss | 1.25 |" in text


def test_a_damaged_card_is_named(tmp_path):
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no model card"):
        read_card(tmp_path)
