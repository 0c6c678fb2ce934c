"""A synthetic data set in LLaVA's format: pictures, videos, sounds with questions that need them, and text alone.

Sample i of a split depends only on (seed, split, i), so a larger set begins with the smaller one.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_scale.data.toy.clips import make_clip
from llava_scale.data.toy.questions import (
    Question,
    ask_about_one,
    ask_about_two,
    ask_without_picture,
    different_questions,
    tell_all,
)
from llava_scale.data.toy.scenes import Scene, Split, draw_scene, encode, render
from llava_scale.data.toy.sight_and_sound import make_sight_and_sound
from llava_scale.data.toy.sounds import make_sound
from llava_scale.errors import ConfigError, suggest
from llava_scale.types import PLACEHOLDERS, MediaKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NUM_TURNS = (1, 1, 1, 1, 1, 1, 2, 3)
"""Questions in a conversation, drawn with equal chances. Most have one: what earlier answers tell need not be seen."""

_TELL_ALL_SHARE = 0.25
_PART = 500  # samples that one process makes at a time


@dataclass(frozen=True, slots=True)
class ToySample:
    """Encoded media (kind, extension, bytes) in order, and the questions about them.

    Attributes:
        media: The files.
        questions: What is asked.
        video_audio: Whether the sound track of the video belongs to the sample.
    """

    media: tuple[tuple[MediaKind, str, bytes], ...]
    questions: tuple[Question, ...]
    video_audio: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyResult:
    """What was written: the JSON of each split and how many samples it holds."""

    train_json: Path
    test_json: Path
    num_train: int
    num_test: int


def make_one_picture(rng: random.Random, split: Split, num_turns: int) -> ToySample:
    """One picture and questions about it."""
    scene = draw_scene(rng, split)
    if split == "train" and rng.random() < _TELL_ALL_SHARE:
        return ToySample((_picture(rng, scene),), (tell_all(rng, scene),))
    return ToySample((_picture(rng, scene),), different_questions(lambda: ask_about_one(rng, scene, split), num_turns))


def make_two_pictures(rng: random.Random, split: Split, num_turns: int) -> ToySample:
    """Two pictures and questions that need the right one, or both."""
    scenes = draw_scene(rng, split), draw_scene(rng, split)
    questions = different_questions(lambda: ask_about_two(rng, *scenes), num_turns)
    return ToySample(tuple(_picture(rng, scene) for scene in scenes), questions)


def make_text(rng: random.Random, split: Split, num_turns: int) -> ToySample:
    """Questions that need no picture."""
    del split
    return ToySample((), different_questions(lambda: ask_without_picture(rng), num_turns))


MAKERS: dict[str, dict[Callable[[random.Random, Split, int], ToySample], float]] = {
    "image": {make_one_picture: 0.87, make_two_pictures: 0.05},
    "text": {make_text: 0.05},
    "video": {make_clip: 0.29},
    "audio": {make_sound: 0.06},
    "video_audio": {make_sight_and_sound: 0.05},
}
"""Makers of samples by modality, with their shares relative to each other."""

DEFAULT_MODALITIES = ("image", "text")


def write_toy(
    out: str | Path,
    *,
    num_samples: int,
    num_test: int = 0,
    seed: int = 0,
    modalities: Sequence[str] = DEFAULT_MODALITIES,
    workers: int = 1,
) -> ToyResult:
    """Write ``train.json``, ``test.json`` and ``media/`` into ``out``.

    The combinations of things in test pictures never occur in training pictures
    (:func:`llava_scale.data.toy.scenes.is_held_out`). Conversations have one to three questions; a quarter of the
    training pictures comes with a question that asks for everything. The field ``task`` names the skill, or
    ``dialogue`` where there are several turns.

    Args:
        out: Folder; existing files of the same name are replaced.
        num_samples: Training samples.
        num_test: Test samples; a tenth of the training samples, at least 20, if 0.
        seed: Seed of everything.
        modalities: Which of ``MAKERS`` to draw from.
        workers: Processes; their number changes nothing in the files.

    Raises:
        ConfigError: a count below 1, an unknown modality, or a folder that cannot be written.
    """
    _check_modalities(modalities)
    if num_samples < 1 or num_test < 0:
        raise ConfigError(f"num_samples must be at least 1 and num_test at least 0, got {num_samples} and {num_test}")
    folder = Path(out)
    counts: dict[Split, int] = {"train": num_samples, "test": num_test or max(20, num_samples // 10)}
    try:
        (folder / "media").mkdir(parents=True, exist_ok=True)
        for split, number in counts.items():
            records = _write_samples(folder, split, seed, range(number), tuple(modalities), workers)
            (folder / f"{split}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the synthetic data into {folder}: {error.strerror}") from None
    return ToyResult(
        train_json=folder / "train.json",
        test_json=folder / "test.json",
        num_train=counts["train"],
        num_test=counts["test"],
    )


def make_sample(split: Split, seed: int, number: int, modalities: Sequence[str] = DEFAULT_MODALITIES) -> ToySample:
    """Sample ``number`` of a split; ``modalities`` in another order draw the same."""
    rng = random.Random(f"{seed}/{split}/{number}")
    makers = {maker: share for name, group in MAKERS.items() if name in modalities for maker, share in group.items()}
    (maker,) = rng.choices(tuple(makers), tuple(makers.values()))
    turns = rng.choice(_NUM_TURNS)
    sample = maker(rng, split, turns)
    while not sample.questions:
        sample = maker(rng, split, turns)
    return sample


def _check_modalities(modalities: Sequence[str]) -> None:
    for name in modalities:
        if name not in MAKERS:
            raise ConfigError(f"unknown modality {name!r}; {suggest(name, MAKERS)}")
    if not modalities:
        raise ConfigError(f"name at least one modality of {', '.join(MAKERS)}")


def _write_samples(
    folder: Path, split: Split, seed: int, numbers: range, modalities: tuple[str, ...], workers: int
) -> list[dict[str, Any]]:
    """Write the media of many samples and return their records, in order."""
    if workers < 2 or len(numbers) <= _PART:
        return [_write_sample(folder, split, seed, number, modalities) for number in numbers]
    parts = [numbers[start : start + _PART] for start in range(0, len(numbers), _PART)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        tasks = [pool.submit(_write_samples, folder, split, seed, part, modalities, 1) for part in parts]
        return [record for task in tasks for record in task.result()]


def _write_sample(folder: Path, split: Split, seed: int, number: int, modalities: Sequence[str]) -> dict[str, Any]:
    """Write the media of one sample and return its record."""
    sample = make_sample(split, seed, number, modalities)
    name = f"{split}-{number:06d}"
    record: dict[str, Any] = {"id": name}
    for place, (kind, extension, data) in enumerate(sample.media):
        path = Path("media") / f"{name}-{place}.{extension}"
        (folder / path).write_bytes(data)
        record.setdefault(kind, []).append(path.as_posix())
    if sample.video_audio:
        record["video_audio"] = True
    record["task"] = sample.questions[0].task if len(sample.questions) == 1 else "dialogue"
    record["conversations"] = _conversation(sample)
    return record


def _conversation(sample: ToySample) -> list[dict[str, str]]:
    turns = []
    lead = "".join(f"{PLACEHOLDERS[kind]}\n" for kind, _, _ in sample.media)
    for question in sample.questions:
        turns.append({"from": "human", "value": lead + question.text})
        turns.append({"from": "gpt", "value": question.answer})
        lead = ""
    return turns


def _picture(rng: random.Random, scene: Scene) -> tuple[MediaKind, str, bytes]:
    extension = rng.choice(("png", "jpg"))
    return "image", extension, encode(render(scene, rng), extension)
