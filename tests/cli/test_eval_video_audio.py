"""Evaluation of a model that sees and hears, from files to scores."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from llava_scale.cli import build_app
from llava_scale.config import ModelConfig
from llava_scale.data.toy.samples import write_toy
from llava_scale.data.write import pack
from llava_scale.model import build_model


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder, num_samples=1, num_test=30, seed=3, modalities=("video", "audio", "video_audio"))
    pack(folder / "test.json", folder / "shards", media_root=folder)
    return folder / "shards"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = build_model(ModelConfig(preset="tiny", audio_tower="tiny"), chat_template="native", seed=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_each_modality_is_scored_with_blank_media_and_shuffled_frames(checkpoint, shards, tmp_path):
    command = ["eval", str(checkpoint), "--data", str(shards), "--out", str(tmp_path), "--shuffle-frames"]
    done = CliRunner().invoke(build_app(), [*command, "--max-new-tokens", "3", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert result["skipped"] == []
    assert {"video", "audio", "video_audio"} <= set(result["exact_match"])
    assert set(result["blind_model"]) == {"video", "audio", "video_audio"}
    assert set(result["shuffled_frames"]) == {"video", "video_audio"}
    asked = {group: share["total"] for group, share in result["exact_match"].items()}
    assert {group: share["total"] for group, share in result["blind_model"].items()}.items() <= asked.items()
    assert (tmp_path / "eval.html").exists()
