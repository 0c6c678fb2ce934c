from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from stamp_dataset import build_dataset, views
from stamps import CANVAS, Stamp

from llava_scale.errors import ShardError

WORDS = ["owl", "pig", "cow", "hen", "cat", "dog", "ant", "bee", "fox", "rat", "ape", "elk", "emu", "gnu", "yak", "bat"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "stamps"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for word in WORDS:
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("RGBA").save(folder / f"{word}.png")
        (folder / f"{word}.txt").write_text(f"A {word}.\n")
    return folder


def test_the_json_has_every_view_of_training_stamps_and_one_of_held_out_ones(root: Path, tmp_path: Path) -> None:
    built = build_dataset(root, tmp_path / "out", num_views=3)
    train = json.loads((tmp_path / "out/train.json").read_text())
    held_out = json.loads((tmp_path / "out/held_out.json").read_text())
    assert (built.num_stamps, built.num_groups) == (len(WORDS), len(WORDS))
    assert built.num_pictures + built.num_held_out == len(WORDS)
    assert len(train) == built.num_train == 3 * built.num_pictures
    assert len(held_out) == built.num_held_out > 0
    captions = [{record["conversations"][-1]["value"] for record in part} for part in (train, held_out)]
    assert not captions[0] & captions[1]
    for record in train + held_out:
        assert [turn["from"] for turn in record["conversations"]] == ["system", "human", "gpt"]
        assert record["conversations"][1]["value"] == "<image>"
        with Image.open(tmp_path / "out" / record["image"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (CANVAS, CANVAS))


def test_building_twice_gives_the_same_files(root: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_dataset(root, tmp_path / name, num_views=4)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) > len(WORDS)
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_a_folder_without_stamps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no stamps"):
        build_dataset(tmp_path, tmp_path / "out", num_views=1)


@pytest.mark.parametrize("mirrorable", [True, False])
def test_views_are_mirrored_only_where_the_author_allows_it(mirrorable: bool) -> None:
    picture = Image.new("RGB", (CANVAS, CANVAS), "white")
    ImageDraw.Draw(picture).rectangle((10, 10, 100, 245), fill="black")
    owner = Stamp(key="a", description="A.", pictures=(), mirrorable=mirrorable)
    darker_left = []
    for view in views(picture, owner, 6, seed="a"):
        ink = 255 - np.asarray(view.convert("L"), dtype=float)
        half = CANVAS // 2
        darker_left.append(bool(ink[:, :half].sum() > ink[:, half:].sum()))
    assert darker_left == ([True, False] * 3 if mirrorable else [True] * 6)


def test_the_first_views_are_the_picture_and_its_mirror_image_and_later_ones_differ() -> None:
    generator = np.random.default_rng(1)
    picture = Image.fromarray(generator.integers(0, 255, (CANVAS, CANVAS, 3), dtype=np.uint8))
    owner = Stamp(key="a", description="A.", pictures=(), mirrorable=True)
    first, second, third, fourth = (np.asarray(view) for view in views(picture, owner, 4, seed="a"))
    assert (first == np.asarray(picture)).all()
    assert (second == first[:, ::-1]).all()
    assert not (third == first).all()
    assert not (fourth == second).all()
