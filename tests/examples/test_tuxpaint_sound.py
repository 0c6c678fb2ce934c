"""Clips and questions made of Tux Paint's sounds, and the yardsticks beside the scores."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_sound import RECIPE, by_task, evaluate, make_data, matches, nearest
from sound_dataset import CLIP_S, LANGUAGES, RATE, build_sounds, clips, find_effects

from llava_scale.config import ModelConfig, load_config
from llava_scale.data.write import pack
from llava_scale.errors import ShardError
from llava_scale.model import build_model
from tests.data.media_files import sound_file


def tone(hertz, seconds=3.0):
    time = np.arange(round(seconds * RATE)) / RATE
    wave = 0.5 * np.sin(2 * np.pi * hertz * time).astype(np.float32)
    return sound_file(wave[None], "ogg", "libopus", 48_000 if seconds < 0 else RATE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    for number, name in enumerate(("animals/birds/crow", "animals/mammals/cow", "household/bell", "animals/bee")):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".txt").write_text("A thing.\n")
        file.with_suffix(".ogg").write_bytes(tone(400 + 300 * number))
        if name != "animals/bee":
            Image.new("RGB", (20, 20), (60 * number, 0, 90)).save(file.with_suffix(".png"))
    for thing in range(8):
        for number, language in enumerate(LANGUAGES):
            (folder / f"household/{thing}_desc_{language}.ogg").write_bytes(tone(300 + 100 * number, 0.6))
    numbers = folder / "symbols/math"
    numbers.mkdir(parents=True)
    for name in ("3", "3_es", "7_de", "3_desc_fr"):
        (numbers / f"{name}.ogg").write_bytes(tone(900, 0.6))
    (folder / "animals/broken.txt").write_text("x")
    (folder / "animals/broken.ogg").write_bytes(b"no sound")
    return folder


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    target = tmp_path_factory.mktemp("built")
    return target, build_sounds(root, target)


def records(target: Path, part: str) -> list[dict[str, str]]:
    return json.loads((target / f"{part}.json").read_text())


def test_effects_have_names_kinds_and_pictures_and_broken_ones_are_left_out(root: Path) -> None:
    found = {effect.name: (effect.kind, effect.picture is not None) for effect in find_effects(root)}
    assert found == {
        "bee": ("other animal", False),
        "crow": ("bird", True),
        "cow": ("mammal", True),
        "bell": ("thing", True),
    }


def test_every_task_holds_out_what_it_asks_about(built: tuple[Path, dict[str, int]]) -> None:
    target, counts = built
    assert counts["held_out language"] == 2 * len(LANGUAGES)
    assert counts["train language"] == 6 * len(LANGUAGES)
    assert (counts["train digit"], counts["held_out digit"]) == (6, 1)
    assert counts["train source"] == 6 * counts["held_out source"] == 24
    assert counts["train match"] == 6 * counts["held_out match"] == 36
    names = [
        {record["id"].split("-", 2)[2] for record in records(target, part) if record["task"] not in ("source", "match")}
        for part in ("train", "held_out")
    ]
    assert not names[0] & names[1]
    answers = [
        record["conversations"][1]["value"] for record in records(target, "held_out") if record["task"] == "match"
    ]
    assert answers.count("yes") == answers.count("no") == 3


def test_building_twice_gives_the_same_files(root: Path, built: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    build_sounds(root, tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert all((tmp_path / file).read_bytes() == (built[0] / file).read_bytes() for file in files)


def test_clips_are_short_pieces_of_their_sound() -> None:
    sound = torch.linspace(-1, 1, 5 * RATE)
    found = list(clips(sound, 4, random.Random(0)))
    assert {len(clip) for clip in found} == {round(CLIP_S * RATE)}
    assert torch.equal(found[0], sound[: len(found[0])])


def test_the_nearest_clip_knows_tones_it_has_heard(built: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    for part in ("train", "held_out"):
        assert not pack(built[0] / f"{part}.json", tmp_path / part, media_root=built[0]).bad
    known, asked = (by_task(tmp_path / part)["language"] for part in ("train", "held_out"))
    truth = [sample.turns[-1].text for sample in asked]
    assert matches(nearest(known, asked), truth) == len(truth)
    assert matches([" CROW ", "cow"], ["crow", "bee"]) == 1


def test_a_folder_without_sounds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no sound effects"):
        build_sounds(tmp_path, tmp_path / "out")


def test_scores_stand_beside_chance_and_blind_ones(root: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    make_data(root, tmp_path)
    make_data(root, tmp_path)  # what is there stays
    model, processor = build_model(ModelConfig(preset="tiny", audio_tower="tiny"), chat_template="native", seed=0)
    model.save_pretrained(tmp_path / "final")
    processor.save_pretrained(tmp_path / "final")
    found = evaluate(tmp_path / "final", tmp_path / "shards")["tasks"]
    assert found["match"]["num"] == 6
    assert found["match"]["chance"] == found["match"]["commonest_answer"] == 0.5
    assert found["language"]["nearest_clip"] == 1.0
    assert found["digit"]["chance"] == 0.1
    for row in found.values():
        assert row["interval"][0] <= row["exact_match"] <= row["interval"][1]
    config = load_config(RECIPE)
    assert config.model.audio_tower == "tiny"
