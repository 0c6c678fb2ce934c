"""Videos with a sound that belongs to one of the things in them, or to none: questions need both.

Two things jump, one in each half of the video, or one thing jumps and the sound comes with its jumps or at other times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_scale.data.toy.clips import (
    NUM_FRAMES,
    NUM_SLOTS,
    SECONDS,
    SLOT_FRAMES,
    Actor,
    look,
    render_clip,
)
from llava_scale.data.toy.encoding import encode_video
from llava_scale.data.toy.questions import NUMBERS, Question, different_questions
from llava_scale.data.toy.scenes import IMAGE_SIZE, Split, is_held_out
from llava_scale.data.toy.sounds import RATES, TIMBRES, Note, near, render_sound, sound_file

if TYPE_CHECKING:
    import random

    from llava_scale.data.toy.samples import ToySample

_SMALL, _JUMPED = round(0.1 * IMAGE_SIZE), round(0.17 * IMAGE_SIZE)
_SPOTS = ((IMAGE_SIZE // 4, IMAGE_SIZE // 2), (IMAGE_SIZE - IMAGE_SIZE // 4 - 1, IMAGE_SIZE // 2))
_BEEP_S = 0.2
_OWN_TRACK_SHARE = 0.5

JOINT_TASKS = ("source", "sync")
"""Skills that need both picture and sound."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Things, notes, and which things sound.

    Attributes:
        actors: One or two things; they jump.
        notes: The sound.
        source: Number of the thing that sounds, None if the notes come at other times than its jumps.
    """

    actors: tuple[Actor, ...]
    notes: tuple[Note, ...]
    source: int | None


def draw_scene(rng: random.Random, split: Split) -> Scene:
    """A scene that belongs to the split."""
    while True:
        scene = _draw_two(rng) if rng.random() < 0.6 else _draw_one(rng)
        label = sorted(f"{actor.name} {actor.act}" for actor in scene.actors)
        if is_held_out((*label, scene.notes[0].timbre, str(scene.source))) == (split == "test"):
            return scene


def make_sight_and_sound(rng: random.Random, split: Split, num_turns: int) -> ToySample:
    """A video with its sound as its own track or as a second file, and questions."""
    # samples.py lists this maker, so it is imported when both modules are there.
    from llava_scale.data.toy.samples import ToySample

    scene = draw_scene(rng, split)
    questions = different_questions(lambda: _ask(rng, scene), num_turns)
    rate = rng.choice(RATES)
    wave = render_sound(scene.notes, rng, rate, SECONDS)
    frames = render_clip(scene.actors, rng)
    if rng.random() < _OWN_TRACK_SHARE:
        return ToySample((("video", "mp4", encode_video(frames, wave, rate)),), questions, video_audio=True)
    return ToySample((("video", "mp4", encode_video(frames)), sound_file(rng, wave, rate)), questions)


def _draw_two(rng: random.Random) -> Scene:
    """Two things that jump in different halves; the sound goes with one of them."""
    half = NUM_SLOTS // 2
    halves = [range(half), range(half, NUM_SLOTS)]
    rng.shuffle(halves)
    jumps = [_some(rng, slots) for slots in halves]
    spots = rng.sample(_SPOTS, 2)
    actors = tuple(_jumper(*looks, spot, slots) for looks, spot, slots in zip(look(rng, 2), spots, jumps, strict=True))
    source = rng.randrange(2)
    return Scene(actors, _notes(rng, jumps[source]), source)


def _draw_one(rng: random.Random) -> Scene:
    """One thing; the sound comes with its jumps, or in the other half."""
    half = NUM_SLOTS // 2
    first = rng.randrange(2) * half
    slots = _some(rng, range(first, first + half))
    actors = (_jumper(*look(rng, 1)[0], rng.choice(_SPOTS), slots),)
    if rng.random() < 0.5:
        return Scene(actors, _notes(rng, slots), 0)
    other = half - first
    return Scene(actors, _notes(rng, _some(rng, range(other, other + half))), None)


def _some(rng: random.Random, slots: range) -> tuple[int, ...]:
    """One to three of the slots, in order."""
    return tuple(sorted(rng.sample(slots, rng.randint(1, 3))))


def _jumper(color: str, shape: str, spot: tuple[int, int], slots: tuple[int, ...]) -> Actor:
    """A thing that is large in the given slots."""
    radii = tuple(_JUMPED if frame // SLOT_FRAMES in slots else _SMALL for frame in range(NUM_FRAMES))
    return Actor(color, shape, (spot,) * NUM_FRAMES, radii, "jumps " + " ".join(map(str, slots)))


def _notes(rng: random.Random, slots: tuple[int, ...]) -> tuple[Note, ...]:
    timbre, pitch = rng.choice(list(TIMBRES)), near(rng, "middle")
    slot_s = SECONDS / NUM_SLOTS
    return tuple(Note(timbre, pitch, slot * slot_s + 0.02, _BEEP_S) for slot in slots)


def _ask(rng: random.Random, scene: Scene) -> Question | None:
    kind = rng.choice(("joint", "joint", "timbre", "beeps"))
    if kind == "timbre":
        return Question("timbre", "Which instrument plays?", scene.notes[0].timbre)
    if kind == "beeps":
        return Question("beeps", "How many beeps are there?", NUMBERS[len(scene.notes)])
    if len(scene.actors) == 2:
        assert scene.source is not None
        return Question("source", "Which object makes the sound?", scene.actors[scene.source].name)
    answer = "no" if scene.source is None else "yes"
    return Question("sync", f"Does the {scene.actors[0].name} jump with the sound?", answer)
