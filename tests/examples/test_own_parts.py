"""The three examples that users copy, from a recipe to a checkpoint that loads and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import own_task
import pytest
import torch
from own_compressor import Fovea, StridedConv, Windows
from own_tower import ConvTower
from typer.testing import CliRunner

from llava_scale.cli import build_app
from llava_scale.config import load_config
from llava_scale.errors import ConfigError
from llava_scale.eval.task_file import load_task
from llava_scale.model import build_model, load_model, row_inputs
from llava_scale.serving.engine import Engine, GenerationRequest
from llava_scale.types import MediaInfo, Turn
from llava_scale.viz.token_maps import Looker
from tests.model.parts import packed_row, pictures

EXAMPLES = Path(__file__).parents[2] / "examples"
FOVEA = "{type: custom, import_path: own_compressor:Fovea, arguments: {centre: 2}}"
CONV = "{type: custom, import_path: own_compressor:StridedConv, arguments: {width: 24}}"
TOWER = ("model.vision_tower=own_tower:ConvTower", "model.vision_tower_kwargs={width: 32, image_size: 32}")


def build(*fields, seed=0):
    config = load_config(None, ["model.preset=tiny", *fields])
    return build_model(config.model, chat_template="native", seed=seed)


def answer(parts, png):
    request = GenerationRequest(turns=(Turn("user", "<image>\nwhat is it?"),), media={"image": [png]})
    return Engine(*parts).generate([request], max_new_tokens=6)


@pytest.fixture
def png(tmp_path):
    own_task.draw_chart([10, 50, 80, 30]).save(tmp_path / "chart.png")
    return (tmp_path / "chart.png").read_bytes()


@pytest.mark.parametrize(
    "fields",
    [TOWER, (f"model.compressor={FOVEA}",), (f"model.compressor={CONV}",), (*TOWER, f"model.compressor={CONV}")],
)
def test_checkpoints_with_own_parts_load_and_answer_as_before(fields, png, tmp_path):
    model, processor = build(*fields, seed=4)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again[0].state_dict()[name]), name
    assert answer(again, png) == answer((model, processor), png)
    assert again[1].token_counter.fingerprint() == processor.token_counter.fingerprint()


@pytest.mark.parametrize("fields", [TOWER, (f"model.compressor={CONV}",)])
def test_own_parts_are_trained(fields):
    model, processor = build(*fields)
    count = processor.token_counter.count(MediaInfo(kind="image"), step=0).num_tokens
    ids = [5, 6, *[model.config.image_token_id] * count, 7, 8]
    row = packed_row([(ids, [-100] * (len(ids) - 2) + [7, 8])], pictures(model, 1))
    model.train()(**row_inputs(row)).loss.backward()
    part = model.vision_tower if fields == TOWER else model.compressor
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters())


def test_weights_of_own_parts_depend_on_the_seed_alone():
    one, same, other = (
        build(f"model.compressor={CONV}", seed=seed)[0].compressor.inner.conv.weight for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("grid", [(1, 4, 4), (2, 5, 7), (3, 12, 12), (1, 1, 9)])
@pytest.mark.parametrize("centre", [0, 2, 3, 40])
def test_the_fovea_keeps_its_promise_its_order_and_every_token(grid, centre):
    frames, rows, cols = grid
    x = torch.randn(2, frames * rows * cols, 3)
    made = Fovea(centre=centre)
    out = made(x, grid)
    assert out.tokens.shape == (2, made.num_tokens(grid, None), 3)
    assert (out.positions.diff(dim=1) > 0).all()
    assert (out.sizes.sum(dim=1) == x.shape[1]).all()
    means = [x[0, out.group[0] == number].mean(dim=0) for number in range(out.tokens.shape[1])]
    torch.testing.assert_close(out.tokens[0], torch.stack(means))
    if centre == 40:
        assert torch.equal(out.tokens, x)


def test_the_strided_convolution_counts_what_it_makes():
    for grid in ((1, 4, 4), (2, 5, 7)):
        made = StridedConv(6, width=8)
        out = made(torch.randn(2, grid[0] * grid[1] * grid[2], 6), grid)
        assert out.tokens.shape == (2, Windows(2).num_tokens(grid, None), 8)
        assert out.positions.max() < grid[0] * grid[1] * grid[2]


def test_frames_of_a_clip_are_compressed_alike():
    model, _ = build(f"model.compressor={FOVEA}")
    frames = pictures(model, 3)
    assert model.visual_tokens(frames, 3).tokens.shape[1] == model.num_visual_tokens(3) == 3 * model.num_visual_tokens()


def test_merges_of_an_own_compressor_are_shown():
    looker = Looker(*build(f"model.compressor={FOVEA}"))
    (found,) = looker.merges(pictures(looker.model, 1))
    assert found.title.startswith("custom: ")


def test_the_tower_is_used_at_the_size_it_is_given():
    tower = ConvTower(width=32, image_size=48)
    rows, cols = tower.grid(48, 48)
    assert tower(torch.randn(1, 3, 48, 48)).shape == (1, rows * cols, 32)
    model, processor = build("model.vision_tower=own_tower:ConvTower", "model.image_size=40")
    assert model.num_visual_tokens() == 25
    assert processor.image_grid == (5, 5)


def test_a_trained_checkpoint_takes_an_own_compressor_without_weights(tmp_path, png):
    model, processor = build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = load_config(None, [f"model.init_from={tmp_path}", f"model.compressor={FOVEA}"]).model
    changed = build_model(config, chat_template="native", seed=0)
    assert answer(changed, png) == answer(build(f"model.compressor={FOVEA}"), png)
    config = load_config(None, [f"model.init_from={tmp_path}", f"model.compressor={CONV}"]).model
    with pytest.raises(ConfigError, match="custom cannot take the place of None"):
        build_model(config, chat_template="native", seed=0)


@pytest.mark.parametrize(
    ("given", "points"),
    [("50", 1.0), ("51.9%", 1.0), ("52.6", 0.0), ("47.5.", 1.0), ("fifty", 0.0), ("", 0.0), (" 50 ", 1.0)],
)
def test_charts_are_scored_with_a_tolerance(given, points):
    assert own_task.close_enough([given], [["50"]]) == [points]
    assert own_task.close_enough(["N/A", "x"], [["n/a"], ["7", "X"]]) == [1.0, 1.0]


def test_the_task_file_asks_about_every_chart(tmp_path):
    task = load_task(own_task.write_charts(tmp_path / "charts", number=5))
    assert (task.name, task.scorer, task.is_generated) == ("charts", "own_task:close_enough", True)
    records = json.loads((tmp_path / "charts/records.json").read_text())
    assert all((tmp_path / "charts" / record["image"]).is_file() for record in records)
    model, processor = build()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = [
        "eval",
        str(tmp_path / "model"),
        "--tasks",
        str(tmp_path / "charts/charts.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert CliRunner().invoke(build_app(), command, catch_exceptions=False).exit_code == 0
    (found,) = json.loads((tmp_path / "out/tasks.json").read_text())["tasks"]
    assert found["scores"]["close_enough"]["num_items"] == 5
    assert found["scores"]["close_enough"]["method"] == "bootstrap"


@pytest.mark.slow
def test_the_commands_above_the_examples_run(tmp_path):
    """As users type them: in a folder with the examples on PYTHONPATH."""
    environment = {**os.environ, "PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"}
    cli = [sys.executable, "-c", "from llava_scale.cli import main; main()"]

    def run(*words):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    run(*cli, "data", "toy", "data/toy", "--num-samples", "60")
    run(*cli, "data", "pack", "data/toy/train.json", "data/train")
    recipe = [str(EXAMPLES.parent / "configs/quickstart.yaml"), "data.sources=[{path: data/train}]", "train.steps=3"]
    run(*cli, "train", *recipe, TOWER[0], "train.output_dir=runs/own_tower")
    run(*cli, "train", *recipe, f"model.compressor={FOVEA}", "train.output_dir=runs/fovea")
    run(sys.executable, str(EXAMPLES / "own_task.py"), "data/charts")
    run(
        *cli,
        "eval",
        "runs/fovea/final",
        "--tasks",
        "data/charts/charts.yaml",
        "--out",
        "runs/fovea/charts",
        "--processes",
        "2",
    )
    assert (tmp_path / "runs/fovea/charts/tasks.html").is_file()
