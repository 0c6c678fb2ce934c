from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np
import pytest

from llava_scale.data.media import decode_image
from llava_scale.data.toy.questions import NUMBERS
from llava_scale.data.toy.samples import make_sample, write_toy
from llava_scale.data.toy.scenes import CELLS, COLORS, SHAPES, Thing, combination_of, draw_scene, render
from llava_scale.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

import random


def test_training_and_test_pictures_never_show_the_same_combination_of_things():
    scenes = {split: [draw_scene(random.Random(seed), split) for seed in range(600)] for split in ("train", "test")}
    shown = {split: {combination_of(scene) for scene in drawn} for split, drawn in scenes.items()}
    assert not shown["train"] & shown["test"]
    assert min(map(len, shown.values())) > 100
    for drawn in scenes.values():
        things = [thing for scene in drawn for thing in scene]
        assert {thing.color for thing in things} == set(COLORS)
        assert {thing.shape for thing in things} == set(SHAPES)
        assert {thing.cell for thing in things} == set(range(len(CELLS)))


def test_the_same_seed_gives_the_same_files_and_a_larger_set_begins_with_the_smaller(tmp_path: Path):
    for name, number in (("a", 6), ("b", 6), ("c", 9)):
        write_toy(tmp_path / name, num_samples=number, num_test=3, seed=7)
    records = [json.loads((tmp_path / name / "train.json").read_text()) for name in "abc"]
    assert records[0] == records[1] == records[2][:6]
    for path in (tmp_path / "a" / "media").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "media" / path.name).read_bytes()
    write_toy(tmp_path / "d", num_samples=6, num_test=3, seed=8)
    assert json.loads((tmp_path / "d" / "train.json").read_text()) != records[0]


def test_every_kind_of_sample_is_made_with_its_media(tmp_path: Path):
    result = write_toy(tmp_path, num_samples=120, seed=1)
    records = json.loads(result.train_json.read_text())
    seen = Counter(len(record.get("image", [])) for record in records)
    assert set(seen) == {0, 1, 2}
    assert {len(record["conversations"]) > 2 for record in records} == {True, False}
    for record in records:
        text = "".join(turn["value"] for turn in record["conversations"])
        assert text.count("<image>") == len(record.get("image", []))
        for name in record.get("image", []):
            pixels = decode_image((tmp_path / name).read_bytes(), max_pixels=10_000)
            assert pixels.shape == (3, 48, 48)
    assert len({record["task"] for record in records}) > 5


def test_answers_are_true_of_the_scene():
    scene = (
        Thing("red", "ring", "small", 0),
        Thing("blue", "triangle", "large", 1),
        Thing("red", "cross", "large", 3),
    )
    from llava_scale.data.toy import questions as ask

    rng = random.Random(0)
    answers = {q.text: q.answer for q in (ask.ask_about_one(rng, scene) for _ in range(6000)) if q is not None}
    assert answers["What color is the triangle?"] == "blue"
    assert answers["What shape is the blue object?"] == "triangle"
    assert answers["Where is the red cross?"] == "red cross bottom right"
    assert answers["Where is the cross?"] == "cross bottom right"
    assert answers["Where is the blue object?"] == "blue object top right"
    assert answers["What is at the top left?"] == "red ring"
    assert answers["What is right of the red ring?"] == "blue triangle"
    assert answers["What is left of the blue object?"] == "red ring"
    assert answers["What is below the triangle?"] == "red cross"
    assert answers["How many red objects are there?"] == "two"
    assert answers["How many objects are there?"] == NUMBERS[3]
    assert answers["Is the blue triangle small or large?"] == "large"
    assert answers["List color by shape."] == "cross red and ring red and triangle blue"
    assert answers["List place by name."] == "blue triangle top right and red cross bottom right and red ring top left"
    assert answers["List place by shape."] == "cross bottom right and ring top left and triangle top right"
    assert "List place by color." not in answers
    assert answers["Describe the picture."] == (
        "a small red ring at the top left and a large blue triangle at the top right "
        "and a large red cross at the bottom right"
    )
    assert "What shape is the red object?" not in answers
    assert "Where is the red object?" not in answers


def test_the_picture_shows_the_scene():
    pixels = render((Thing("red", "square", "large", 3),), random.Random(0)).astype(int)
    reddish = (pixels[..., 0] - pixels[..., 1] > 80).nonzero()
    assert np.min(reddish) >= 24
    assert len(reddish[0]) > 100


def test_the_most_frequent_answers_of_training_score_low_on_test_pictures():
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for number in range(1200):
        sample = make_sample("train", 0, number)
        for question in sample.questions if sample.media else ():
            seen[question.text][question.answer] += 1
    asked = [
        question
        for number in range(800)
        for sample in [make_sample("test", 0, number)]
        if sample.media
        for question in sample.questions
    ]
    right = sum(
        question.text in seen and seen[question.text].most_common(1)[0][0] == question.answer for question in asked
    )
    assert right / len(asked) < 0.3


def test_a_count_below_one_and_an_unwritable_folder_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="at least 1"):
        write_toy(tmp_path, num_samples=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the synthetic data"):
        write_toy(tmp_path / "file", num_samples=1)


def test_every_modality_is_written_as_real_files(tmp_path: Path):
    write_toy(tmp_path, num_samples=30, num_test=2, modalities=("video_audio", "audio", "video"))
    records = json.loads((tmp_path / "train.json").read_text())
    kinds = {tuple(kind for kind in ("image", "video", "audio") if kind in record) for record in records}
    assert kinds == {("video",), ("audio",), ("video", "audio")}
    for record in records:
        for kind in ("video", "audio"):
            asked = record["conversations"][0]["value"].count(f"<{kind}>")
            assert asked == len(record.get(kind, []))
            assert all((tmp_path / path).stat().st_size > 500 for path in record.get(kind, []))


def test_pictures_and_text_stay_what_they_were_beside_the_other_makers():
    default = [make_sample("train", 5, number) for number in range(20)]
    assert default == [make_sample("train", 5, number, ("text", "image")) for number in range(20)]
    assert all(kind == "image" for sample in default for kind, _, _ in sample.media)


def test_an_unknown_modality_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown modality 'vidio'; did you mean 'video'"):
        write_toy(tmp_path, num_samples=1, modalities=("vidio",))
