from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from llava_scale.cli import build_app
from llava_scale.data.write import pack
from llava_scale.errors import ConfigError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("view")
    Image.new("RGB", (30, 20), "red").save(root / "a.png")
    turns = [{"from": "human", "value": "What color?"}, {"from": "gpt", "value": "Red."}]
    records = [{"id": f"k{i}", "image": "a.png", "conversations": turns} for i in range(6)]
    (root / "data.json").write_text(json.dumps(records))
    pack(root / "data.json", root / "shards", media_root=root, shard_size=4, workers=1)
    return root / "shards"


def run(*arguments: object):
    return CliRunner().invoke(build_app(), ["data", *(str(item) for item in arguments)], catch_exceptions=False)


def test_show_writes_a_page_with_and_without_a_model(shards, tmp_path):
    done = run("show", shards, "--num", 2, "--out", tmp_path / "a.html")
    assert done.exit_code == 0, done.output
    assert "a.html: open it in a browser" in done.output
    done = run("show", shards, "--preset", "tiny", "--template", "plain", "--key", "k3", "--out", tmp_path / "b.html")
    assert done.exit_code == 0, done.output
    html = (tmp_path / "b.html").read_text()
    assert "template <b>plain</b>" in html
    assert ">k3</b>" in html


def test_show_looks_through_a_recipe_and_a_tokenizer(shards, tmp_path):
    from llava_scale.model.presets import tiny_tokenizer

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: mine\nmodel: {preset: tiny}\ndata: {chat_template: native, packing: {row_length: 8}}\n")
    assert run("show", shards, "--config", recipe, "--out", tmp_path / "a.html").exit_code == 0
    assert "do not fit in a row of 8" in (tmp_path / "a.html").read_text()
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert run("show", shards, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "b.html").exit_code == 0
    assert 'class="t on"' in (tmp_path / "b.html").read_text()


def test_stats_print_a_table_and_write_the_page(shards, tmp_path):
    pytest.importorskip("matplotlib")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {preset: tiny}\ndata: {packing: {row_length: 256}}\n")
    done = run("stats", shards, "--config", recipe, "--out", tmp_path / "stats")
    assert done.exit_code == 0, done.output
    assert "6 samples, 6 looked at" in done.output
    assert "supervised tokens" in done.output
    assert "media: image 6" in done.output
    assert "rows: " in done.output
    assert (tmp_path / "stats" / "stats.html").exists()


def test_contradicting_options_are_refused(shards, tmp_path):
    with pytest.raises(ConfigError, match="--preset and --tokenizer exclude each other"):
        run("show", shards, "--preset", "tiny", "--tokenizer", "x")
    with pytest.raises(ConfigError, match="--template needs a model"):
        run("show", shards, "--template", "plain")
    with pytest.raises(ConfigError, match="unknown preset 'large'; known: tiny"):
        run("stats", shards, "--preset", "large")
