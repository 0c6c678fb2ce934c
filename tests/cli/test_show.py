from __future__ import annotations

import pytest
from PIL import Image
from typer.testing import CliRunner

from llava_scale.cli import build_app
from llava_scale.errors import ConfigError

pytest.importorskip("matplotlib")
MERGING = ["model.preset=tiny", "model.image_size=96", "model.compressor={type: token_merging}"]
QUERIES = ["model.preset=tiny", "model.image_size=96", "model.compressor={type: qformer, num_queries: 5, window: 6}"]


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("name: figures\n")
    return str(tmp_path / "r.yaml")


@pytest.fixture
def picture(tmp_path):
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "p.png")
    return str(tmp_path / "p.png")


def show(*arguments):
    result = CliRunner().invoke(build_app(), ["show", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_merges_windows_and_attention_are_written(recipe, picture, tmp_path):
    out = tmp_path / "new" / "figure.png"
    for arguments in (
        ["merges", recipe, *MERGING, "--image", picture, "--ratio", "0.25", "--ratio", "0.5"],
        ["windows", recipe, *QUERIES],
        ["attention", recipe, *QUERIES, "--image", picture, "--question", "what color", "--question", "how many"],
        ["attention", recipe, *QUERIES, "--image", picture, "--query", "4", "--head", "1"],
    ):
        assert f"written: {out}" in show(*arguments, "--out", str(out))
        assert Image.open(out).format == "PNG"
        out.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merges", *MERGING], "either --image or --video"),
        (["attention", *QUERIES, "--image", "PICTURE", "--query", "5"], "5 queries and 8 heads"),
    ],
)
def test_wrong_questions_are_answered_with_what_to_do(recipe, picture, arguments, message):
    arguments = [picture if item == "PICTURE" else item for item in arguments]
    with pytest.raises(ConfigError, match=message):
        show(arguments[0], recipe, *arguments[1:])
