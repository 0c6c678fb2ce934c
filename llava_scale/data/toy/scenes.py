"""Pictures of coloured shapes: what they hold, which combinations are held out, and how they are drawn.

A scene is up to three things on a 2x2 grid of cells, at most one in each. The combination of things in a scene (their
colours and shapes, wherever they stand) decides by its hash on which split the scene belongs to. So no picture of the
test set shows a combination that a training picture shows, whatever the seeds of the two sets, while every single
colour, shape, size and place occurs in both.
"""

from __future__ import annotations

import functools
import io
import zlib
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

Split = Literal["train", "test"]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "yellow": (240, 212, 28),
    "green": (34, 150, 62),
    "blue": (38, 82, 208),
}
SHAPES = ("ring", "square", "triangle", "cross")
SIZES: dict[str, tuple[int, int]] = {"small": (6, 7), "large": (9, 10)}
"""Radius in pixels: smallest and largest of each size."""
CELLS = ("top left", "top right", "bottom left", "bottom right")
"""Names of the cells in raster order."""
IMAGE_SIZE = 48
MAX_THINGS = 3

_SIDE = 2
_CELL = IMAGE_SIZE // _SIDE
_SUPERSAMPLING = 8
_HELD_OUT_EVERY = 5
_COLOR_JITTER = 10
_JITTER = 2
_BACKGROUND = (226, 250)


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape in a cell (0 to 3, raster order)."""

    color: str
    shape: str
    size: str
    cell: int

    @property
    def name(self) -> str:
        """Colour and shape, as answers say it: ``red circle``."""
        return f"{self.color} {self.shape}"

    @property
    def row(self) -> int:
        """0 at the top, 1 at the bottom."""
        return self.cell // _SIDE

    @property
    def column(self) -> int:
        """0 at the left, 1 at the right."""
        return self.cell % _SIDE


Scene = tuple[Thing, ...]
"""Things in the order of their cells."""


def combination_of(scene: Scene) -> tuple[str, ...]:
    """Colours and shapes of the things, in sorted order."""
    return tuple(sorted(thing.name for thing in scene))


def is_held_out(combination: tuple[str, ...]) -> bool:
    """Whether scenes with this combination belong to the test split; about every fifth combination does."""
    return zlib.crc32(",".join(combination).encode()) % _HELD_OUT_EVERY == 0


def draw_scene(rng: random.Random, split: Split) -> Scene:
    """A scene of 1 to ``MAX_THINGS`` things; about every second one repeats a colour or a shape on purpose.

    Without repetition counts above 1 would be too rare to learn or to ask for.
    """
    while True:
        scene = _draw_any(rng)
        if is_held_out(combination_of(scene)) == (split == "test"):
            return scene


def _draw_any(rng: random.Random) -> Scene:
    wanted = rng.randint(1, MAX_THINGS)
    theme: tuple[str, ...] = rng.choice(((), (), (rng.choice(list(COLORS)),), (rng.choice(SHAPES),)))
    sizes = rng.choice((tuple(SIZES), tuple(SIZES), ("small",), ("large",)))
    num_alike = rng.randint(1, wanted)
    looks = list(product(COLORS, SHAPES))
    alike = [look for look in looks if set(theme) <= set(look)]
    cells = sorted(rng.sample(range(len(CELLS)), wanted))
    chosen = [rng.choice(alike if place < num_alike else looks) for place in range(wanted)]
    rng.shuffle(chosen)
    return tuple(Thing(*look, rng.choice(sizes), cell) for look, cell in zip(chosen, cells, strict=True))


def render(scene: Scene, rng: random.Random) -> NDArray[np.uint8]:
    """The scene as ``(IMAGE_SIZE, IMAGE_SIZE, 3)`` RGB; place in the cell, radius and shades vary with ``rng``."""
    shade = [rng.randint(*_BACKGROUND) for _ in range(3)]
    pixels = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    pixels[:] = shade
    for thing in scene:
        radius = rng.randint(*SIZES[thing.size])
        mask = _mask(thing.shape, radius)
        margin = (_CELL - len(mask)) // 2
        slack = min(margin, _JITTER)
        y = thing.row * _CELL + margin + rng.randint(-slack, slack)
        x = thing.column * _CELL + margin + rng.randint(-slack, slack)
        color = [value + rng.randint(-_COLOR_JITTER, _COLOR_JITTER) for value in COLORS[thing.color]]
        patch = pixels[y : y + len(mask), x : x + len(mask)]
        patch += mask[..., None] * (np.array(color, dtype=np.float32) - patch)
    return pixels.round().clip(0, 255).astype(np.uint8)


def encode(pixels: NDArray[np.uint8], extension: str) -> bytes:
    """The picture as a file: ``png``, or ``jpg`` at a quality that keeps the colours of small shapes apart."""
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if extension == "png":
        picture.save(buffer, format="PNG", compress_level=1)
    else:
        picture.save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _outline(shape: str) -> Callable[[ImageDraw.ImageDraw, float], None]:
    """Drawer of ``shape`` with radius r around (r, r); a cross where it is none of the others.

    Each has its own mark in the middle or the corners, so that small ones can be told apart in a few pixels.
    """

    def polygon(corners: Sequence[tuple[float, float]]) -> Callable[[ImageDraw.ImageDraw, float], None]:
        return lambda pen, r: pen.polygon([(r + r * x, r + r * y) for x, y in corners], fill=255)

    if shape == "ring":
        return _draw_ring
    if shape == "square":
        side = 0.86
        return polygon([(-side, -side), (side, -side), (side, side), (-side, side)])
    if shape == "triangle":
        return polygon([(0, -1), (1, 0.9), (-1, 0.9)])
    arm = 0.34
    upright = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm), (arm, 1), (-arm, 1)]
    return polygon([*upright, (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)])


def _draw_ring(pen: ImageDraw.ImageDraw, r: float) -> None:
    pen.ellipse((0, 0, 2 * r, 2 * r), fill=255)
    pen.ellipse((r / 2, r / 2, 3 * r / 2, 3 * r / 2), fill=0)


@functools.cache
def _mask(shape: str, radius: int) -> NDArray[np.float32]:
    """Coverage of each pixel by the shape, ``(2 * radius + 1, 2 * radius + 1)`` in [0, 1]."""
    side = 2 * radius + 1
    canvas = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    _outline(shape)(ImageDraw.Draw(canvas), (side * _SUPERSAMPLING - 1) / 2)
    small = canvas.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / np.float32(255)
