from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from stamps import (
    CANVAS,
    Stamp,
    core_words,
    english,
    find_stamps,
    group_stamps,
    render,
    series_name,
    split_stamps,
    thumbnail,
)

from llava_scale.errors import LlavaScaleError, SampleError


def drawing(colour: str, *, shape: str = "ellipse", size: tuple[int, int] = (40, 20)) -> Image.Image:
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    getattr(ImageDraw.Draw(picture), shape)((4, 4, size[0] - 5, size[1] - 5), fill=colour)
    return picture


def add_stamp(root: Path, key: str, description: str, *, settings: str = "", colour: str = "red") -> None:
    text = root / f"{key}.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(f"{description}\nde.utf8=Etwas.\n", encoding="utf-8")
    drawing(colour).save(text.with_suffix(".png"))
    if settings:
        text.with_suffix(".dat").write_text(settings, encoding="utf-8")


def stamp(key: str, description: str) -> Stamp:
    return Stamp(key=key, description=description, pictures=(), mirrorable=True)


def noise(seed: int) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    return thumbnail(Image.fromarray(pixels))


def test_a_stamp_is_a_description_with_the_drawings_beside_it(tmp_path: Path) -> None:
    add_stamp(tmp_path, "animals/Big-Owl", "An owl.", settings="nomirror\n")
    drawing("red").save(tmp_path / "animals/Big-Owl_mirror.png")
    add_stamp(tmp_path, "animals/pig", "A  pig.")
    add_stamp(tmp_path, "symbols/letters/a", "The letter a.")
    (tmp_path / "animals/nothing.txt").write_text("Nothing to see.\n")
    owl, pig = find_stamps(tmp_path)
    assert (owl.key, owl.description, owl.mirrorable) == ("animals/big_owl", "An owl.", False)
    assert [path.name for path in owl.pictures] == ["Big-Owl.png", "Big-Owl_mirror.png"]
    assert (pig.key, pig.description, pig.mirrorable) == ("animals/pig", "A pig.", True)


def test_the_english_description_is_the_first_line(tmp_path: Path) -> None:
    text = tmp_path / "kite.txt"
    text.write_text("  A   cafe\u0301.\r\nfr.utf8=Un café.\n", encoding="utf-8")
    assert english(text) == "A café."
    text.write_text("")
    assert english(text) == ""


def test_a_transparent_picture_is_cut_to_what_is_visible_and_set_on_white(tmp_path: Path) -> None:
    drawing("blue", shape="rectangle").save(tmp_path / "box.png")
    pixels = np.asarray(render(tmp_path / "box.png"))
    assert pixels.shape == (CANVAS, CANVAS, 3)
    assert (pixels[0, 0] == 255).all()
    assert tuple(pixels[CANVAS // 2, CANVAS // 2]) == (0, 0, 255)
    blue = (pixels[..., 0] < 128).any(axis=0)
    assert 0.9 < blue.mean() < 0.94  # 4 % of margin on both sides


def test_pictures_without_anything_to_see_are_named(tmp_path: Path) -> None:
    Image.new("RGBA", (5, 5), (0, 0, 0, 0)).save(tmp_path / "void.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(SampleError, match=r"void\.png: nothing of the picture is visible"):
        render(tmp_path / "void.png")
    with pytest.raises(SampleError, match=r"torn\.png: cannot read the picture"):
        render(tmp_path / "torn.png")


def test_an_svg_without_a_renderer_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    (tmp_path / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(LlavaScaleError, match="pip install resvg-py"):
        render(tmp_path / "a.svg")


@pytest.mark.parametrize(
    ("one", "other"),
    [("A lemon.", "A yellow lemon."), ("A silver garbage can.", "Garbage can"), ("Two flowers.", "Some flowers!")],
)
def test_descriptions_that_differ_in_colour_or_size_have_the_same_core(one: str, other: str) -> None:
    assert core_words(one) == core_words(other)


def test_descriptions_of_other_things_have_another_core() -> None:
    assert core_words("A lemon.") != core_words("A lemon tree.")
    assert core_words("Red.") == "red"


def test_names_of_a_series_share_their_first_word() -> None:
    assert series_name("town/grave_a") == series_name("town/grave_b") == "town/grave"
    assert series_name("town/rocket12") == series_name("town/rocket")
    assert series_name("sea/grave_a") != series_name("town/grave_a")
    assert series_name("space/3_earth") == "space/3_earth"


def test_near_duplicates_are_grouped_directly_and_through_others() -> None:
    stamps = [
        stamp("food/lemon", "A lemon."),
        stamp("art/citrus", "A yellow lemon."),  # same words as the first
        stamp("art/citrus_2", "Half a fruit."),  # same series as the second
        stamp("toys/ball", "A ball."),
        stamp("toys/copy", "A sphere."),  # same picture, mirrored
        stamp("toys/car", "A car."),
    ]
    pictures = [noise(number) for number in range(6)]
    pictures[4] = pictures[3][:, ::-1]
    groups = group_stamps(stamps, pictures)
    assert sorted(map(sorted, groups)) == [[0, 1, 2], [3, 4], [5]]


def test_a_split_keeps_groups_whole_and_held_out_captions_apart() -> None:
    stamps = [stamp(f"f/{'abc'[number % 3] * 3}{number}", f"Thing {number % 40}.") for number in range(120)]
    groups = [list(range(start, start + 4)) for start in range(0, 120, 4)]
    train, held_out = split_stamps(stamps, groups, 0.3)
    group_of = {position: number for number, members in enumerate(groups) for position in members}
    assert train
    assert held_out
    assert not {group_of[position] for position in train} & {group_of[position] for position in held_out}
    captions = [stamps[position].description for position in held_out]
    assert len(set(captions)) == len(captions)
    assert split_stamps(stamps, groups, 0.3) == (train, held_out)
