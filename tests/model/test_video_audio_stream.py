from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from llava_scale.cli import build_app
from llava_scale.config import DataConfig, ModelConfig
from llava_scale.config.data import PackingConfig, SourceConfig
from llava_scale.data.loader import open_stream
from llava_scale.data.toy.samples import write_toy
from llava_scale.model import build_model, row_inputs


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Packed samples of all modalities; the sound of one is cut off."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder, num_samples=14, num_test=1, seed=3, modalities=("image", "text", "video", "audio", "video_audio"))
    broken = next(record for record in json.loads((folder / "train.json").read_text()) if "video" in record)
    path = folder / broken["video"][0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    arguments = [folder / "train.json", folder / "shards", "--media-root", folder, "--allow-bad", 2]
    result = CliRunner().invoke(build_app(), ["data", "pack", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return folder / "shards"


def test_rows_of_all_modalities_train_as_they_were_planned(shards, tmp_path):
    model, processor = build_model(ModelConfig(preset="tiny", audio_tower="tiny"), chat_template="native", seed=0)
    config = DataConfig(
        sources=(SourceConfig(path=str(shards)),),
        num_workers=0,
        cache_dir=str(tmp_path),
        packing=PackingConfig(mode="samples", samples_per_row=13, row_length=2048),
    )
    stream = open_stream(
        config,
        seed=0,
        rows_per_step=1,
        encoder=processor.chat_encoder,
        counter=processor.token_counter,
        image_transform=processor.image_transform,
        transforms=processor.media_transforms,
    )
    with stream:
        (row,) = next(iter(stream)).rows
    assert row.image_grids
    assert row.video_grids
    assert row.audio_grids
    assert len(row.pixel_values_videos) == sum(grid[0] for grid in row.video_grids)
    for kind in ("image", "video", "audio"):
        token = getattr(model.config, f"{kind}_token_id")
        assert int((row.input_ids == token).sum()) == sum(getattr(row, f"{kind}_num_tokens"))
    model.train()
    loss = model(**row_inputs(row)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.any() for parameter in model.audio_projector.parameters())
