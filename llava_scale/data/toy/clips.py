"""Videos of coloured shapes that move, bounce, appear in turn or change, with questions about them.

A video lasts 2 seconds: eight slots of a quarter of a second, so that eight frames taken from the middles of equal
spans show every slot once. What sets one video apart from another (things and what they do) decides by its hash on
which split it belongs to, as for pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from llava_scale.data.toy.encoding import VIDEO_RATE, encode_video
from llava_scale.data.toy.questions import NUMBERS, Question, different_questions
from llava_scale.data.toy.scenes import COLORS, IMAGE_SIZE, SHAPES, Split, is_held_out
from llava_scale.data.toy.scenes import _mask as shape_mask

if TYPE_CHECKING:
    import random

    from numpy.typing import NDArray

    from llava_scale.data.toy.samples import ToySample

NUM_SLOTS = 8
SLOT_FRAMES = 2
NUM_FRAMES = NUM_SLOTS * SLOT_FRAMES
SECONDS = NUM_FRAMES / VIDEO_RATE

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Steps in x and y."""
SPEEDS: dict[str, int] = {"slow": round(0.15 * IMAGE_SIZE), "fast": round(0.5 * IMAGE_SIZE)}
"""Pixels from the first to the last frame."""
MAX_BOUNCES = 2

_RADIUS = round(0.16 * IMAGE_SIZE)
_SHRUNK, _GROWN = round(0.08 * IMAGE_SIZE), round(0.2 * IMAGE_SIZE)
_LANES = (round(0.26 * IMAGE_SIZE), round(0.73 * IMAGE_SIZE))
_MARGIN = _RADIUS + 2


@dataclass(frozen=True, slots=True)
class Actor:
    """One thing of a video and what it does.

    Attributes:
        color: Its colour, at first.
        shape: Its shape.
        places: Centre (x, y) in each frame.
        radii: Radius in each frame; 0 where it is not there.
        act: What it does, in words; with colour and shape it decides on the split.
        late_color: Its colour in the second half.
    """

    color: str
    shape: str
    places: tuple[tuple[int, int], ...]
    radii: tuple[int, ...]
    act: str
    late_color: str = ""

    @property
    def name(self) -> str:
        """Colour and shape: ``red circle``."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Clip:
    """The things of a video, and who asks about it."""

    actors: tuple[Actor, ...]
    askers: tuple[Callable[[random.Random, Clip], Question | None], ...]


def combination_of(clip: Clip) -> tuple[str, ...]:
    """Names and acts of the things, in sorted order."""
    return tuple(sorted(f"{actor.name} {actor.act}" for actor in clip.actors))


def draw_clip(rng: random.Random, split: Split) -> Clip:
    """A video of one of the ``KINDS`` that belongs to the split."""
    while True:
        clip = rng.choice(KINDS)(rng)
        if is_held_out(combination_of(clip)) == (split == "test"):
            return clip


def make_clip(rng: random.Random, split: Split, num_turns: int) -> ToySample:
    """A video and questions about it."""
    # samples.py lists this maker, so it is imported when both modules are there.
    from llava_scale.data.toy.samples import ToySample

    clip = draw_clip(rng, split)
    questions = different_questions(lambda: rng.choice(clip.askers)(rng, clip), num_turns)
    return ToySample((("video", "mp4", encode_video(render_clip(clip.actors, rng))),), questions)


def render_clip(actors: tuple[Actor, ...], rng: random.Random) -> NDArray[np.uint8]:
    """Frames ``(NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3)``; shades vary with ``rng``."""
    shade = [rng.randint(226, 250) for _ in range(3)]
    frames = np.empty((NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    frames[:] = shade
    for actor in actors:
        jitter = [rng.randint(-10, 10) for _ in range(3)]
        for number in range(NUM_FRAMES):
            radius = actor.radii[number]
            if not radius:
                continue
            late = actor.late_color and number >= NUM_FRAMES // 2
            color = np.array(COLORS[actor.late_color if late else actor.color], np.float32) + jitter
            x, y = (centre - radius for centre in actor.places[number])
            mask = shape_mask(actor.shape, radius)
            patch = frames[number, y : y + len(mask), x : x + len(mask)]
            patch += mask[..., None] * (color - patch)
    return frames.round().clip(0, 255).astype(np.uint8)


def look(rng: random.Random, number: int) -> list[tuple[str, str]]:
    """Colours and shapes of ``number`` things; no two share a colour or a shape."""
    return list(zip(rng.sample(list(COLORS), number), rng.sample(SHAPES, number), strict=True))


def draw_motion(rng: random.Random) -> Clip:
    """One or two things that go straight on, each in its lane, slow or fast."""
    horizontal = rng.random() < 0.5
    ways = ("left", "right") if horizontal else ("up", "down")
    lanes = rng.sample(_LANES, rng.choice((1, 2, 2)))
    actors = []
    for (color, shape), lane in zip(look(rng, len(lanes)), lanes, strict=True):
        way, speed = rng.choice(ways), rng.choice(list(SPEEDS))
        length = SPEEDS[speed]
        first = rng.randint(_MARGIN, IMAGE_SIZE - 1 - _MARGIN - length)
        along = [first + round(length * number / (NUM_FRAMES - 1)) for number in range(NUM_FRAMES)]
        if sum(DIRECTIONS[way]) < 0:
            along.reverse()
        places = tuple((x, lane) if horizontal else (lane, x) for x in along)
        actors.append(Actor(color, shape, places, (_RADIUS,) * NUM_FRAMES, f"{way} {speed}"))
    return Clip(tuple(actors), (ask_direction, ask_direction, ask_speed, ask_mover, ask_faster))


def draw_bounces(rng: random.Random) -> Clip:
    """One thing between two walls that turns back up to ``MAX_BOUNCES`` times."""
    ((color, shape),) = look(rng, 1)
    bounces = rng.randint(0, MAX_BOUNCES)
    low, high = _MARGIN, IMAGE_SIZE - 1 - _MARGIN
    walk = np.linspace(0, bounces + 1, NUM_FRAMES)
    along = [round(low + (high - low) * float(abs((way + 1) % 2 - 1))) for way in walk]
    if rng.random() < 0.5:
        along = [low + high - x for x in along]
    lane = rng.randint(_MARGIN, IMAGE_SIZE - 1 - _MARGIN)
    horizontal = rng.random() < 0.5
    places = tuple((x, lane) if horizontal else (lane, x) for x in along)
    actor = Actor(color, shape, places, (_RADIUS,) * NUM_FRAMES, f"bounces {bounces}")
    return Clip((actor,), (ask_bounces, ask_bounces, ask_look))


def draw_order(rng: random.Random) -> Clip:
    """Two or three things, one after another."""
    number = rng.choice((2, 3))
    edges = [round(NUM_SLOTS * part / number) * SLOT_FRAMES for part in range(number + 1)]
    actors = []
    for turn, (color, shape) in enumerate(look(rng, number)):
        place = (rng.randint(_MARGIN, IMAGE_SIZE - 1 - _MARGIN), rng.randint(_MARGIN, IMAGE_SIZE - 1 - _MARGIN))
        radii = tuple(_RADIUS if edges[turn] <= frame < edges[turn + 1] else 0 for frame in range(NUM_FRAMES))
        actors.append(Actor(color, shape, (place,) * NUM_FRAMES, radii, f"turn {turn}"))
    return Clip(tuple(actors), (ask_turn, ask_turn, ask_next, ask_before))


def draw_change(rng: random.Random) -> Clip:
    """One thing that changes its colour half-way, or grows or shrinks."""
    ((color, shape),) = look(rng, 1)
    place = (rng.randint(_GROWN + 2, IMAGE_SIZE - _GROWN - 3), rng.randint(_GROWN + 2, IMAGE_SIZE - _GROWN - 3))
    actor = Actor(color, shape, (place,) * NUM_FRAMES, (_RADIUS,) * NUM_FRAMES, "")
    if rng.random() < 0.5:
        late = rng.choice([other for other in COLORS if other != color])
        return Clip((replace(actor, late_color=late, act=f"becomes {late}"),), (ask_colors,))
    radii = [round(_SHRUNK + (_GROWN - _SHRUNK) * number / (NUM_FRAMES - 1)) for number in range(NUM_FRAMES)]
    grows = rng.random() < 0.5
    actor = replace(actor, radii=tuple(radii if grows else reversed(radii)), act="grows" if grows else "shrinks")
    return Clip((actor,), (ask_growth, ask_growth, ask_look))


KINDS: tuple[Callable[[random.Random], Clip], ...] = (draw_motion, draw_motion, draw_bounces, draw_order, draw_change)
"""Kinds of videos; motion comes twice as often."""

ORDER_TASKS = ("direction", "bounces", "turn", "next", "before", "change", "growth")
"""Skills that need the order of the frames: answers to them fall apart when frames are shuffled."""


def ask_direction(rng: random.Random, clip: Clip) -> Question | None:
    """Where a thing goes."""
    actor = rng.choice(clip.actors)
    return Question("direction", f"Which way does the {actor.name} move?", actor.act.split()[0])


def ask_speed(rng: random.Random, clip: Clip) -> Question | None:
    """Whether a thing is slow or fast."""
    actor = rng.choice(clip.actors)
    return Question("speed", f"Is the {actor.name} slow or fast?", actor.act.split()[1])


def ask_mover(rng: random.Random, clip: Clip) -> Question | None:
    """Which of two things goes a given way, if only one does."""
    ways = [actor.act.split()[0] for actor in clip.actors]
    if len(set(ways)) < 2:
        return None
    actor = rng.choice(clip.actors)
    return Question("direction", f"What moves {actor.act.split()[0]}?", actor.name)


def ask_faster(rng: random.Random, clip: Clip) -> Question | None:
    """Which of two things is the faster or slower one, if they differ."""
    speeds = {actor.act.split()[1]: actor for actor in clip.actors}
    if len(speeds) < 2:
        return None
    word, speed = rng.choice((("faster", "fast"), ("slower", "slow")))
    return Question("faster", f"Which object is {word}?", speeds[speed].name)


def ask_bounces(rng: random.Random, clip: Clip) -> Question | None:
    """How often the thing turns back."""
    del rng
    (actor,) = clip.actors
    return Question("bounces", f"How many times does the {actor.name} bounce?", NUMBERS[int(actor.act.split()[1])])


def ask_look(rng: random.Random, clip: Clip) -> Question | None:
    """Colour or shape of the only thing; one frame is enough."""
    (actor,) = clip.actors
    if rng.random() < 0.5:
        return Question("color", f"What color is the {actor.shape}?", actor.color)
    return Question("shape", f"What shape is the {actor.color} object?", actor.shape)


def ask_turn(rng: random.Random, clip: Clip) -> Question | None:
    """What comes first or last."""
    word, actor = rng.choice((("first", clip.actors[0]), ("last", clip.actors[-1])))
    return Question("turn", f"What appears {word}?", actor.name)


def ask_next(rng: random.Random, clip: Clip) -> Question | None:
    """What follows a named thing."""
    place = rng.randrange(len(clip.actors) - 1)
    return Question("next", f"What comes after the {clip.actors[place].name}?", clip.actors[place + 1].name)


def ask_before(rng: random.Random, clip: Clip) -> Question | None:
    """Whether one thing comes before another."""
    first, second = rng.sample(range(len(clip.actors)), 2)
    text = f"Does the {clip.actors[first].name} come before the {clip.actors[second].name}?"
    return Question("before", text, "yes" if first < second else "no")


def ask_colors(rng: random.Random, clip: Clip) -> Question | None:
    """The colour at the beginning or at the end."""
    (actor,) = clip.actors
    word, color = rng.choice((("at first", actor.color), ("at the end", actor.late_color)))
    return Question("change", f"What color is the {actor.shape} {word}?", color)


def ask_growth(rng: random.Random, clip: Clip) -> Question | None:
    """Whether the thing grows or shrinks."""
    del rng
    (actor,) = clip.actors
    return Question("growth", f"Does the {actor.name} grow or shrink?", actor.act.removesuffix("s"))
