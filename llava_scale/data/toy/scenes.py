"""Pictures of coloured shapes: what they hold, which combinations are held out, and how they are drawn.

A scene is up to nine things on a 3x3 grid of cells, at most one in each. The combinations of colour, shape and cell
are divided once and for all by :func:`is_held_out`: a training picture holds none of the held-out ones, a test picture
holds nothing else. So every single thing in a test picture stands where no thing of its colour and shape ever stood
during training, whatever the seeds of the two sets.
"""

from __future__ import annotations

import functools
import io
import math
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
Combination = tuple[str, str, int]
"""Colour, shape and cell of a thing."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "orange": (246, 138, 20),
    "yellow": (240, 212, 28),
    "green": (34, 150, 62),
    "blue": (38, 82, 208),
    "purple": (132, 44, 164),
    "pink": (246, 132, 182),
    "black": (24, 24, 28),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
SIZES: dict[str, tuple[int, int]] = {"small": (5, 6), "large": (9, 10)}
"""Radius in pixels: smallest and largest of each size."""
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
"""Names of the cells in raster order."""
IMAGE_SIZE = 72
MAX_THINGS = 5

_CELL = IMAGE_SIZE // 3
_SUPERSAMPLING = 8
_HELD_OUT_RESIDUES = (0, 4)
_COLOR_JITTER = 10
_JITTER = 2
_BACKGROUND = (226, 250)


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape in a cell (0 to 8, raster order)."""

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
        """0 at the top, 2 at the bottom."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """0 at the left, 2 at the right."""
        return self.cell % 3

    @property
    def combination(self) -> Combination:
        """What :func:`is_held_out` decides on."""
        return self.color, self.shape, self.cell


Scene = tuple[Thing, ...]
"""Things in the order of their cells."""


def is_held_out(color: str, shape: str, cell: int) -> bool:
    """Whether the combination belongs to the test split; 80 of the 360 do, two cells of each colour and shape."""
    number = 5 * list(COLORS).index(color) + 2 * SHAPES.index(shape)
    return (cell + number) % 9 in _HELD_OUT_RESIDUES


@functools.cache
def combinations_of(split: Split) -> tuple[Combination, ...]:
    """Every combination that pictures of ``split`` may hold."""
    every = product(COLORS, SHAPES, range(len(CELLS)))
    return tuple(item for item in every if is_held_out(*item) == (split == "test"))


def draw_scene(rng: random.Random, split: Split, *, num_things: int | None = None) -> Scene:
    """A scene of 1 to ``MAX_THINGS`` things; about every second one repeats a colour, a shape or a size on purpose.

    Without repetition counts above 1 would be too rare to learn or to ask for.
    """
    wanted = num_things or rng.randint(1, MAX_THINGS)
    theme: tuple[str, ...] = rng.choice(((), (), (rng.choice(list(COLORS)),), (rng.choice(SHAPES),)))
    sizes = rng.choice((tuple(SIZES), tuple(SIZES), ("small",), ("large",)))
    num_alike = rng.randint(1, wanted)
    scene: Scene = ()
    while len(scene) < wanted:
        required = theme if len(scene) < num_alike else ()
        scene = add_thing(rng, split, scene, required=required, sizes=sizes)
    return scene


def add_thing(
    rng: random.Random,
    split: Split,
    scene: Scene,
    *,
    required: Sequence[str] = (),
    sizes: Sequence[str] = tuple(SIZES),
) -> Scene:
    """``scene`` with one more thing in a free cell, of a colour and shape not there yet where possible.

    Args:
        rng: Source of every choice.
        split: Which combinations are allowed.
        scene: Things that are there already; at least one cell must be free.
        required: Colours or shapes that the thing must have.
        sizes: Sizes to choose from.
    """
    taken = {thing.cell for thing in scene}
    allowed = [item for item in combinations_of(split) if item[2] not in taken and set(required) <= set(item[:2])]
    if not allowed:  # every allowed cell of a required colour or shape is taken
        allowed = [item for item in combinations_of(split) if item[2] not in taken]
    color, shape, cell = rng.choice(allowed)
    thing = Thing(color, shape, rng.choice(tuple(sizes)), cell)
    return tuple(sorted((*scene, thing), key=lambda item: item.cell))


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
    """Drawer of ``shape`` with radius r around (r, r)."""

    def polygon(corners: Sequence[tuple[float, float]]) -> Callable[[ImageDraw.ImageDraw, float], None]:
        return lambda pen, r: pen.polygon([(r + r * x, r + r * y) for x, y in corners], fill=255)

    if shape == "circle":
        return lambda pen, r: pen.ellipse((0, 0, 2 * r, 2 * r), fill=255)
    if shape == "square":
        side = 0.86  # about the area of the circle, so that area alone does not tell them apart
        return polygon([(-side, -side), (side, -side), (side, side), (-side, side)])
    if shape == "triangle":
        return polygon([(0, -1), (1, 0.9), (-1, 0.9)])
    if shape == "cross":
        arm = 0.34
        upright = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm), (arm, 1), (-arm, 1)]
        return polygon([*upright, (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)])
    spikes = [(1.0 if i % 2 == 0 else 0.42, math.pi * i / 5) for i in range(10)]
    return polygon([(length * math.sin(angle), -length * math.cos(angle)) for length, angle in spikes])


@functools.cache
def _mask(shape: str, radius: int) -> NDArray[np.float32]:
    """Coverage of each pixel by the shape, ``(2 * radius + 1, 2 * radius + 1)`` in [0, 1]."""
    side = 2 * radius + 1
    canvas = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    _outline(shape)(ImageDraw.Draw(canvas), (side * _SUPERSAMPLING - 1) / 2)
    small = canvas.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / np.float32(255)
