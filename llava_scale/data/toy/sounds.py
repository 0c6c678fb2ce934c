"""Sounds of five timbres that beep, rise, fall or take turns, with questions about them.

A sound lasts 2 seconds and is encoded as WAV, FLAC or MP3 at different rates. Timbres differ in what real instruments
differ in: harmonics, noise, attack and decay. What sets one sound apart from another decides by its hash on which
split it belongs to, as for pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llava_scale.data.toy.encoding import encode_sound
from llava_scale.data.toy.questions import NUMBERS, Question, different_questions
from llava_scale.data.toy.scenes import Split, is_held_out

if TYPE_CHECKING:
    import random

    from numpy.typing import NDArray

    from llava_scale.data.toy.samples import ToySample
    from llava_scale.types import MediaKind

SECONDS = 2.0
RATES = (16_000, 22_050)
"""Samples a second of the files."""
FILE_SHARES: dict[str, float] = {"wav": 0.45, "flac": 0.4, "mp3": 0.15}
"""Extension -> share of the files."""
MAX_BEEPS = 5

TIMBRES: dict[str, tuple[tuple[tuple[float, float], ...], float]] = {
    "flute": (((1, 1.0), (2, 0.08)), 0.0),
    "clarinet": (((1, 1.0), (3, 0.6), (5, 0.4), (7, 0.25)), 0.0),
    "trumpet": (((1, 0.6), (2, 0.8), (3, 0.7), (4, 0.5), (5, 0.4), (6, 0.3)), 0.0),
    "bell": (((1, 1.0), (2.76, 0.7), (5.4, 0.4)), 6.0),
    "drum": ((), 14.0),
}
"""Instrument -> (multiple of the pitch, strength) of its partials (none is noise), and its decay a second."""

PITCHES: dict[str, float] = {"low": 300.0, "middle": 520.0, "high": 900.0}
"""Name -> Hz; every note is up to a semitone off."""


@dataclass(frozen=True, slots=True)
class Note:
    """One tone: instrument, pitch in Hz, when it begins and how long it lasts in seconds."""

    timbre: str
    pitch_hz: float
    start_s: float
    length_s: float


@dataclass(frozen=True, slots=True)
class Sound:
    """The notes of a sound, what they are in words (this decides on the split), and who asks about it."""

    notes: tuple[Note, ...]
    combination: tuple[str, ...]
    askers: tuple[Callable[[random.Random, Sound], Question | None], ...]


def draw_sound(rng: random.Random, split: Split) -> Sound:
    """A sound of one of the ``KINDS`` that belongs to the split."""
    while True:
        sound = rng.choice(KINDS)(rng)
        if is_held_out(sound.combination) == (split == "test"):
            return sound


def make_sound(rng: random.Random, split: Split, num_turns: int) -> ToySample:
    """A sound file and questions about it."""
    # samples.py lists this maker, so it is imported when both modules are there.
    from llava_scale.data.toy.samples import ToySample

    sound = draw_sound(rng, split)
    questions = different_questions(lambda: rng.choice(sound.askers)(rng, sound), num_turns)
    rate = rng.choice(RATES)
    return ToySample((sound_file(rng, render_sound(sound.notes, rng, rate), rate),), questions)


def sound_file(rng: random.Random, wave: NDArray[np.float32], rate: int) -> tuple[MediaKind, str, bytes]:
    """The wave as a medium of a sample, in one of the formats."""
    (extension,) = rng.choices(tuple(FILE_SHARES), tuple(FILE_SHARES.values()))
    return "audio", extension, encode_sound(wave, extension, rate)


def render_sound(
    notes: tuple[Note, ...], rng: random.Random, rate: int, seconds: float = SECONDS
) -> NDArray[np.float32]:
    """The wave in [-1, 1]; loudness and a faint noise vary with ``rng``."""
    noise = np.random.default_rng(rng.getrandbits(32))
    wave = noise.normal(0, 0.002, round(seconds * rate))
    level = rng.uniform(0.25, 0.6)
    for note in notes:
        tone = level * _tone(note, rate, noise)
        first = round(note.start_s * rate)
        wave[first : first + len(tone)] += tone[: len(wave) - first]
    return wave.clip(-1, 1).astype(np.float32)


def near(rng: random.Random, name: str) -> float:
    """A pitch up to a semitone off the named one, in Hz."""
    return PITCHES[name] * 2 ** (rng.uniform(-1, 1) / 12)


def draw_beeps(rng: random.Random) -> Sound:
    """One to ``MAX_BEEPS`` notes of one instrument and pitch."""
    timbre, pitch, number = rng.choice(list(TIMBRES)), rng.choice(list(PITCHES)), rng.randint(1, MAX_BEEPS)
    hertz = near(rng, pitch)
    step = rng.uniform(0.3, 0.38)
    first = rng.uniform(0.05, SECONDS - 0.1 - step * number)
    notes = tuple(Note(timbre, hertz, first + step * turn, 0.16) for turn in range(number))
    return Sound(notes, (timbre, pitch, str(number)), (ask_count, ask_count, ask_timbre, ask_height))


def draw_melody(rng: random.Random) -> Sound:
    """Three notes of one instrument that rise or fall."""
    timbre = rng.choice([name for name, (partials, _) in TIMBRES.items() if partials])
    rising = rng.random() < 0.5
    names = list(PITCHES) if rising else list(reversed(PITCHES))
    first, step = rng.uniform(0.05, 0.2), rng.uniform(0.5, 0.58)
    notes = tuple(Note(timbre, near(rng, name), first + step * turn, 0.4) for turn, name in enumerate(names))
    label = (timbre, "rises" if rising else "falls", str(round(step * 20)), str(round(first * 20)))
    return Sound(notes, label, (ask_melody, ask_melody, ask_timbre))


def draw_turns(rng: random.Random) -> Sound:
    """Two instruments, one after the other."""
    pitch = rng.choice(list(PITCHES))
    pair = rng.sample(list(TIMBRES), 2)
    starts = (rng.uniform(0.05, 0.3), rng.uniform(1.05, 1.3))
    notes = tuple(Note(timbre, near(rng, pitch), at, 0.55) for timbre, at in zip(pair, starts, strict=True))
    return Sound(notes, (*pair, pitch), (ask_turn, ask_turn, ask_pair))


KINDS: tuple[Callable[[random.Random], Sound], ...] = (draw_beeps, draw_melody, draw_turns)

ORDER_TASKS = ("melody", "sound order")
"""Skills that need the order of what is heard."""


def ask_count(rng: random.Random, sound: Sound) -> Question | None:
    """How many notes there are."""
    del rng
    return Question("beeps", "How many beeps are there?", NUMBERS[len(sound.notes)])


def ask_timbre(rng: random.Random, sound: Sound) -> Question | None:
    """Which instrument plays."""
    del rng
    return Question("timbre", "Which instrument plays?", sound.notes[0].timbre)


def ask_height(rng: random.Random, sound: Sound) -> Question | None:
    """Whether the pitch is low or high; only of instruments that have one, and not in between."""
    del rng
    timbre, pitch, _ = sound.combination
    if timbre == "drum" or pitch == "middle":
        return None
    return Question("pitch", "Is the pitch low or high?", pitch)


def ask_melody(rng: random.Random, sound: Sound) -> Question | None:
    """Whether the pitch rises or falls."""
    del rng
    return Question("melody", "Does the pitch rise or fall?", sound.combination[1].removesuffix("s"))


def ask_turn(rng: random.Random, sound: Sound) -> Question | None:
    """Which instrument plays first or last."""
    word, note = rng.choice((("first", sound.notes[0]), ("last", sound.notes[-1])))
    return Question("sound order", f"Which instrument plays {word}?", note.timbre)


def ask_pair(rng: random.Random, sound: Sound) -> Question | None:
    """Whether an instrument is heard at all."""
    heard = [note.timbre for note in sound.notes]
    other = rng.choice([name for name in TIMBRES if name not in heard])
    name = rng.choice((*heard, other, other))
    return Question("hearing", f"Is there a {name}?", "yes" if name in heard else "no")


def _tone(note: Note, rate: int, noise: np.random.Generator) -> NDArray[np.float64]:
    partials, decay = TIMBRES[note.timbre]
    time = np.arange(round(note.length_s * rate)) / rate
    if partials:
        phases = 2 * np.pi * note.pitch_hz * time
        audible = [(ratio, strength) for ratio, strength in partials if ratio * note.pitch_hz < 0.45 * rate]
        waves = np.stack([strength * np.sin(ratio * phases) for ratio, strength in audible])
        tone = waves.sum(axis=0) / sum(strength for _, strength in audible)
    else:
        tone = noise.normal(0, 0.5, len(time))
    edge = np.minimum(1, np.minimum(time, time[-1] - time) / 0.012)  # soft ends, no clicks
    shaped: NDArray[np.float64] = tone * edge * np.exp(-decay * time)
    return shaped
