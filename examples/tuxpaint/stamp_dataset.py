"""Stamps to LLaVA JSON with its pictures: ``train.json``, ``held_out.json`` and ``pictures/``."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageOps
from stamps import CANVAS, Stamp, find_stamps, group_stamps, render, split_stamps, thumbnail

from llava_scale.errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

STYLE = "A red car.\nA dog.\nA pair of shoes."
"""System turn of every sample: what descriptions look like. It costs 15 tokens and saves the projector from having to
learn their style; without any picture it takes the language model from 6.0 to 3.8 nats a token (see README)."""
HELD_OUT_SHARE = 0.15
"""Share of the groups of stamps that is held out."""
MAX_ANGLE = 12.0
"""Largest rotation of a training view, in degrees."""
SCALES = (0.72, 1.08)
"""Range of the size of a training view's drawing, against the picture as it stands."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What was made.

    Attributes:
        num_stamps: Stamps found.
        num_groups: Groups of near-duplicates that they form.
        num_pictures: Training pictures before views were made of them.
        num_train: Training samples: all views of them.
        num_held_out: Held-out samples; each has a description of its own.
    """

    num_stamps: int
    num_groups: int
    num_pictures: int
    num_train: int
    num_held_out: int


def build_dataset(root: Path, target: Path, *, num_views: int) -> Built:
    """Write pictures and LLaVA JSON of the stamps below ``root`` to the folder ``target``.

    Every drawing of a training stamp is there ``num_views`` times (see ``views``); of a held-out stamp only its first
    drawing, as it stands.

    Raises:
        ShardError: there are no stamps below ``root``.
        SampleError: a stamp's picture cannot be read.
        LlavaScaleError: there are SVGs and no renderer for them.
    """
    stamps = find_stamps(root)
    if not stamps:
        raise ShardError(
            f"{root} holds no stamps (a .txt with a .png or .svg of the same name); is it the right folder?"
        )
    drawings = [[render(path) for path in stamp.pictures] for stamp in stamps]
    groups = group_stamps(stamps, [thumbnail(pictures[0]) for pictures in drawings])
    train, held_out = split_stamps(stamps, groups, HELD_OUT_SHARE)
    training = [
        _save(target, stamps[position], f"{form}.{view}", picture)
        for position in train
        for form, drawing in enumerate(drawings[position])
        for view, picture in enumerate(views(drawing, stamps[position], num_views, seed=f"{position} {form}"))
    ]
    testing = [_save(target, stamps[position], "0.0", drawings[position][0]) for position in held_out]
    _write(target / "held_out.json", testing)
    _write(target / "train.json", training)
    return Built(
        num_stamps=len(stamps),
        num_groups=len(groups),
        num_pictures=sum(len(drawings[position]) for position in train),
        num_train=len(training),
        num_held_out=len(testing),
    )


def views(drawing: Image.Image, stamp: Stamp, num_views: int, *, seed: str) -> Iterator[Image.Image]:
    """Yield ``num_views`` pictures of a drawing: as it stands, mirrored, then a little turned, sized and shifted.

    Every second view is mirrored where the stamp's author allows mirroring.
    """
    generator = random.Random(seed)
    for number in range(num_views):
        mirrored = stamp.mirrorable and number % 2 == 1
        picture = ImageOps.mirror(drawing) if mirrored else drawing
        as_it_stands = number == 0 or (number == 1 and mirrored)
        yield picture if as_it_stands else _jittered(picture, generator)


def _jittered(picture: Image.Image, generator: random.Random) -> Image.Image:
    """Return the picture turned, scaled and shifted inside the same canvas, white where nothing was."""
    angle = math.radians(generator.uniform(-MAX_ANGLE, MAX_ANGLE))
    scale = generator.uniform(*SCALES)
    slack = abs(CANVAS - CANVAS * scale) / 2
    shift_x, shift_y = (generator.uniform(-slack, slack) for _ in range(2))
    centre = CANVAS / 2
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    # Output pixel -> input pixel: undo the shift, then rotation and scale about the centre.
    x0 = centre - cosine * (centre + shift_x) - sine * (centre + shift_y)
    y0 = centre + sine * (centre + shift_x) - cosine * (centre + shift_y)
    matrix = (cosine, sine, x0, -sine, cosine, y0)
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor="white"
    )


def _save(target: Path, stamp: Stamp, view: str, picture: Image.Image) -> dict[str, object]:
    """Write one picture; return its LLaVA record."""
    name = f"{stamp.key}.{view}"
    file = target / "pictures" / f"{name}.jpg"
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, quality=92)
    return {
        "id": name,
        "image": f"pictures/{name}.jpg",
        "conversations": [
            {"from": "system", "value": STYLE},
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": stamp.description},
        ],
        "task": "caption",
    }


def _write(path: Path, records: Sequence[dict[str, object]]) -> None:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
