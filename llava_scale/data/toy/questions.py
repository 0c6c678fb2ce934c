"""Questions about synthetic scenes that need the picture, each with its one right answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_scale.data.toy.scenes import CELLS, COLORS, MAX_THINGS, SHAPES, Scene, Split, Thing

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

NUMBERS = ("zero", "one", "two", "three", "four", "five")
ORDINALS = ("first", "second", "third")

_QUALITIES: dict[str, Callable[[Thing], str]] = {
    "color": lambda thing: thing.color,
    "shape": lambda thing: thing.shape,
    "place": lambda thing: CELLS[thing.cell],
    "name": lambda thing: thing.name,
}
_LISTS = (("color", "shape"), ("shape", "color"), ("place", "color"), ("place", "shape"), ("place", "name"))
_CAPTION_SHARE = 0.3
_NEIGHBOURS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, and the skill that it tests."""

    task: str
    text: str
    answer: str


def ask_color(rng: random.Random, scene: Scene) -> Question | None:
    """Colour of the only thing of its shape."""
    thing = _only_one(rng, scene, lambda thing: thing.shape)
    return None if thing is None else Question("color", f"What color is the {thing.shape}?", thing.color)


def ask_shape(rng: random.Random, scene: Scene) -> Question | None:
    """Shape of the only thing of its colour."""
    thing = _only_one(rng, scene, lambda thing: thing.color)
    return None if thing is None else Question("shape", f"What shape is the {thing.color} object?", thing.shape)


def ask_size(rng: random.Random, scene: Scene) -> Question | None:
    """Size of a thing."""
    named = _one_named(rng, scene)
    return None if named is None else Question("size", f"Is the {named[1]} small or large?", named[0].size)


def ask_position(rng: random.Random, scene: Scene) -> Question | None:
    """Cell of a thing; the answer says the name again, as an entry of a list does."""
    named = _one_named(rng, scene)
    if named is None:
        return None
    thing, name = named
    return Question("position", f"Where is the {name}?", f"{name} {CELLS[thing.cell]}")


def ask_content(rng: random.Random, scene: Scene) -> Question | None:
    """What stands in a cell."""
    thing = rng.choice(scene)
    return Question("content", f"What is at the {CELLS[thing.cell]}?", thing.name)


def ask_relation(rng: random.Random, scene: Scene) -> Question | None:
    """The neighbour of a named thing in one direction."""
    by_cell = {(thing.row, thing.column): thing for thing in scene}
    pairs = [
        (word, name, by_cell[thing.row + rows, thing.column + columns])
        for thing, name in _names(scene)
        for word, (rows, columns) in _NEIGHBOURS.items()
        if (thing.row + rows, thing.column + columns) in by_cell
    ]
    if not pairs:
        return None
    word, name, neighbour = rng.choice(pairs)
    return Question("relation", f"What is {word} the {name}?", neighbour.name)


def ask_count(rng: random.Random, scene: Scene) -> Question | None:
    """Number of all things, or of those of one colour or shape."""
    what = rng.choice(("all", "color", "shape"))
    if what == "all":
        return Question("count", "How many objects are there?", NUMBERS[len(scene)])
    # a look that is there twice or more is asked for first, so that "one" is not nearly always right
    looks = Counter(thing.color if what == "color" else thing.shape for thing in scene)
    look = rng.choice([name for name, times in looks.items() if times == max(looks.values())])
    noun = f"{look} objects" if what == "color" else "crosses" if look == "cross" else f"{look}s"
    return Question("count", f"How many {noun} are there?", NUMBERS[looks[look]])


def caption_of(scene: Scene) -> Question:
    """Everything there, in raster order."""
    parts = [f"a {thing.size} {thing.name} at the {CELLS[thing.cell]}" for thing in scene]
    return Question("caption", "Describe the picture.", " and ".join(parts))


def tell_all(rng: random.Random, scene: Scene) -> Question:
    """A question whose answer tells of every thing: the densest to learn from.

    Besides captions these are lists of one quality by another, where no two things share the other.
    """
    kinds = [
        (asked, given) for asked, given in _LISTS if len({_QUALITIES[given](thing) for thing in scene}) == len(scene)
    ]
    if not kinds or rng.random() < _CAPTION_SHARE:
        return caption_of(scene)
    asked, given = rng.choice(kinds)
    pairs = sorted((_QUALITIES[given](thing), _QUALITIES[asked](thing)) for thing in scene)
    return Question("list", f"List {asked} by {given}.", " and ".join(f"{key} {value}" for key, value in pairs))


_ABOUT_ONE: dict[Callable[[random.Random, Scene], Question | None], tuple[float, float]] = {
    ask_color: (2, 3),
    ask_shape: (2, 3),
    ask_position: (8, 4),
    ask_content: (2, 2),
    ask_relation: (5, 3),
    ask_count: (5, 3),
    ask_size: (1, 1),
    tell_all: (1, 3),
}
"""Questions about one picture with their shares in training and in tests; those with two possible answers are few.

What takes a second step, from one thing to another or to its place, is practised more often than it is asked.
"""


def ask_about_one(rng: random.Random, scene: Scene, split: Split = "test") -> Question | None:
    """A question about one picture; None where the kind drawn does not fit the scene."""
    shares = [shares[split == "test"] for shares in _ABOUT_ONE.values()]
    (maker,) = rng.choices(tuple(_ABOUT_ONE), shares)
    return maker(rng, scene)


def ask_about_two(rng: random.Random, first: Scene, second: Scene) -> Question | None:
    """A question that needs both pictures, or the right one of the two."""
    if rng.random() < 0.2:
        if len(first) == len(second):
            return None
        word, more = rng.choice((("more", True), ("fewer", False)))
        winner = ORDINALS[0] if (len(first) > len(second)) == more else ORDINALS[1]
        return Question("compare", f"Which picture has {word} objects?", f"the {winner}")
    place = rng.randrange(2)
    maker = rng.choice((ask_color, ask_shape, ask_position, ask_count, tell_all))
    question = maker(rng, (first, second)[place])
    if question is None:
        return None
    return Question("pick", f"In the {ORDINALS[place]} picture: {question.text}", question.answer)


def ask_without_picture(rng: random.Random) -> Question:
    """A question that the text alone answers."""
    kind = rng.choice(("repeat", "word", "sum"))
    words = rng.sample((*COLORS, *SHAPES), 3)
    if kind == "repeat":
        return Question("repeat", f"Say {' '.join(words)}.", " ".join(words))
    if kind == "word":
        place = rng.randrange(3)
        return Question("word", f"What is the {ORDINALS[place]} word of {' '.join(words)}?", words[place])
    left = rng.randint(0, MAX_THINGS)
    right = rng.randint(0, MAX_THINGS - left)
    return Question("sum", f"How many are {NUMBERS[left]} and {NUMBERS[right]}?", NUMBERS[left + right])


def different_questions(draw: Callable[[], Question | None], number: int) -> tuple[Question, ...]:
    """Up to ``number`` questions with different texts, drawn until there are enough or too few new ones come."""
    found: dict[str, Question] = {}
    for _ in range(number * _TRIES):
        question = draw()
        if question is not None:
            found.setdefault(question.text, question)
        if len(found) == number:
            break
    return tuple(found.values())


def _names(scene: Scene) -> list[tuple[Thing, str]]:
    """Things with each of their names (by colour, by shape, by both) that no other thing shares."""
    pairs = [(thing, name) for thing in scene for name in (f"{thing.color} object", thing.shape, thing.name)]
    times = Counter(name for _, name in pairs)
    return [(thing, name) for thing, name in pairs if times[name] == 1]


def _one_named(rng: random.Random, scene: Scene) -> tuple[Thing, str] | None:
    choices = _names(scene)
    return rng.choice(choices) if choices else None


def _only_one(rng: random.Random, scene: Scene, look: Callable[[Thing], str]) -> Thing | None:
    """A thing whose look no other thing shares."""
    times = Counter(map(look, scene))
    choices = [thing for thing in scene if times[look(thing)] == 1]
    return rng.choice(choices) if choices else None
