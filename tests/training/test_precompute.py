from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava_scale.config.load import parse_config
from llava_scale.data.toy.samples import write_toy
from llava_scale.errors import ConfigError, SampleError, ShardError
from llava_scale.model import build_model
from llava_scale.towers import VisionTower
from llava_scale.training import trainer
from llava_scale.training.precompute import precompute
from tests.training.conftest import write_shards


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def losses(config):
    lines = map(json.loads, (Path(config.train.output_dir) / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "lr" in line]


def trained(make_config, tmp_path, name, **settings):
    config = make_config(output_dir=str(tmp_path / name), **settings)
    return config, trainer.train(config)


@pytest.fixture
def no_tower(monkeypatch):
    """A vision tower that must not run."""

    def forbid(self, pixels):
        raise AssertionError("the tower ran")

    return lambda: monkeypatch.setattr(VisionTower, "forward", forbid)


def test_a_run_on_stored_features_has_the_losses_of_one_that_computes_them(make_config, tmp_path, no_tower):
    data = {"holdout": 0.2}
    plain, _ = trained(make_config, tmp_path, "plain", data=data)
    done = precompute(plain, tmp_path / "features")
    assert (done.kinds, done.num_shards, done.num_there) == (("image",), 2, 0)
    assert done.num_media == 39
    no_tower()
    data |= {"features": str(tmp_path / "features")}
    stored, result = trained(make_config, tmp_path, "stored", data=data)
    assert losses(stored) == pytest.approx(losses(plain), abs=1e-6)
    assert len(losses(stored)) == 6
    assert result.evaluation["eval/loss"] > 0
    again = precompute(plain, tmp_path / "features")
    assert (again.num_shards, again.num_there) == (0, 2)


@pytest.mark.parametrize("worker_type", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_workers_of_every_kind_read_them(make_config, tmp_path, no_tower, worker_type):
    data = {"num_workers": 1, "worker_type": worker_type}
    done = precompute(make_config(), tmp_path / "features", dtype="bfloat16", batch_size=3)
    assert done.num_bytes > 0
    no_tower()
    data["features"] = str(tmp_path / "features")
    config, _ = trained(make_config, tmp_path, "run", data=data, steps=2)
    assert len(losses(config)) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": {r"vision_tower\.": 1e-4}}, "vision_tower is trained"),
        ({"model": {"image_aspect_ratio": "resize"}}, "made with another transform"),
        ({"precision": "bf16"}, r"made with another precision: fp32 \(float32 weights\), not bf16"),
        ({"model": {"compressor": {"type": "tome", "ratio": 0.5}}}, "'tome' looks inside the tower"),
    ],
)
def test_features_of_other_towers_transforms_or_types_are_refused(make_config, tmp_path, settings, message):
    precompute(make_config(), tmp_path / "features")
    with pytest.raises(ConfigError, match=message):
        trained(make_config, tmp_path, "run", data={"features": str(tmp_path / "features")}, **settings)


def test_other_weights_of_the_tower_are_noticed(make_config, tmp_path):
    config = make_config()
    precompute(config, tmp_path / "features")
    model, processor = build_model(config.model, chat_template="native", seed=7)
    model.vision_tower.model.get_submodule("encoder").layers[0].layer_norm1.weight.data[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    other = {"preset": "", "init_from": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match="made with another tower"):
        trained(make_config, tmp_path, "run", model=other, data={"features": str(tmp_path / "features")})


def test_what_cannot_be_computed_ahead_is_said(make_config, tmp_path):
    with pytest.raises(ConfigError, match="vision_tower is trained"):
        precompute(make_config(trainable={r"vision_tower\.": 1e-4}), tmp_path / "features")
    with pytest.raises(ConfigError, match="'visionzip' looks inside the tower"):
        precompute(make_config(model={"compressor": {"type": "visionzip"}}), tmp_path / "features")
    assert not (tmp_path / "features").exists()


def test_a_shard_that_came_later_is_asked_for(make_config, make_shards, tmp_path):
    precompute(make_config(), tmp_path / "features")
    more = make_config(data_path=make_shards(num_samples=8), data={"features": str(tmp_path / "features")})
    with pytest.raises(ConfigError, match=r"no features of kind image for 2 of 2 shards.*precompute CONFIG"):
        trainer.train(more)
    precompute(more, tmp_path / "features")
    assert trainer.train(more).steps == 6


def test_bad_pictures_are_skipped_as_without_features(make_config, make_shards, tmp_path):
    path = make_shards(num_samples=40, broken=(3, 10))
    settings = {"data_path": path, "steps": 3, "rows_per_step": 1}
    data = {"max_bad_fraction": 0.5, "packing": {"mode": "samples", "samples_per_row": 16}}
    plain, _ = trained(make_config, tmp_path, "plain", data=data, **settings)
    done = precompute(plain, tmp_path / "features")
    assert sorted(done.unusable) == ["0003", "0010"]
    stored, _ = trained(
        make_config, tmp_path, "stored", data={**data, "features": str(tmp_path / "features")}, **settings
    )
    skipped = [(Path(config.train.output_dir) / "skipped.jsonl").read_text() for config in (plain, stored)]
    assert "0003" in skipped[0]
    assert skipped[0] == skipped[1]
    assert losses(stored) == pytest.approx(losses(plain), abs=1e-6)


def test_a_picture_that_was_bad_then_and_is_not_now_is_an_error(make_config, tmp_path, monkeypatch):
    from llava_scale.data.media import ImageTransform

    def fail(self, data, out=None):
        raise SampleError("no")

    with monkeypatch.context() as patched:
        patched.setattr(ImageTransform, "__call__", fail)
        done = precompute(make_config(), tmp_path / "features")
    assert len(done.unusable) == 39
    with pytest.raises(ShardError, match="could not be read when features were computed, but can now"):
        trained(make_config, tmp_path, "run", data={"features": str(tmp_path / "features")})


def test_videos_and_sounds_are_stored_too(tmp_path):
    from typer.testing import CliRunner

    from llava_scale.cli import build_app

    kinds = ("image", "text", "video", "audio", "video_audio")
    write_toy(tmp_path / "raw", num_samples=14, num_test=1, seed=3, modalities=kinds)
    arguments = ["data", "pack", tmp_path / "raw/train.json", tmp_path / "shards", "--media-root", tmp_path / "raw"]
    packed = CliRunner().invoke(build_app(), [*map(str, arguments)])
    assert packed.exit_code == 0, packed.output
    tree = {
        "model": {"preset": "tiny", "audio_tower": "tiny", "compressor": {"type": "pool", "window": [1, 2, 2]}},
        "data": {
            "sources": [{"path": str(tmp_path / "shards")}],
            "packing": {"row_length": 1024},
            "num_workers": 0,
            "cache_dir": str(tmp_path / "cache"),
        },
        "train": {"output_dir": str(tmp_path / "plain"), "steps": 3, "precision": "fp32", "log_every": 1},
    }
    plain = parse_config(tree, origin="test")
    trainer.train(plain)
    done = precompute(plain, tmp_path / "features")
    assert done.kinds == ("image", "video", "audio")
    tree["data"]["features"], tree["train"]["output_dir"] = str(tmp_path / "features"), str(tmp_path / "stored")
    stored = parse_config(tree, origin="test")
    trainer.train(stored)
    assert losses(stored) == pytest.approx(losses(plain), abs=1e-6)


def test_the_command_says_what_it_did_and_what_comes_next(make_config, tmp_path):
    from typer.testing import CliRunner

    from llava_scale.cli import build_app
    from llava_scale.config import to_yaml

    shards = write_shards(tmp_path / "few", num_samples=6, broken=(1,))
    (tmp_path / "recipe.yaml").write_text(to_yaml(make_config(data_path=shards)))
    done = CliRunner().invoke(build_app(), ["precompute", str(tmp_path / "recipe.yaml"), str(tmp_path / "features")])
    assert done.exit_code == 0, done.output
    assert "4 media (image) of 2 shards" in done.output
    assert "1 samples cannot be read and will be skipped in training: 0001" in done.output
    assert f"data.features={tmp_path / 'features'}" in done.output
