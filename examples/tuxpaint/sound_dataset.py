"""Tux Paint's sounds as LLaVA JSON: what makes a sound, what kind of thing, which language is spoken, which digit.

``kind`` holds out whole recordings, ``language`` whole things, ``digit`` whole languages. ``source`` and ``match`` ask
about the last third of recordings whose first two thirds were heard in training: recognising, not knowing.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import wave
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stamps import render

from llava_scale.data.audio import AudioTransform
from llava_scale.errors import SampleError, ShardError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

RATE = 16_000
CLIP_S = 2.0
SHORTEST_S = 0.3
"""Sound that a clip must hold; shorter ends are left out."""
NUM_VIEWS = 6
"""Training clips of each recording."""
HELD_OUT_SHARE = 0.3
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LANGUAGES = {
    "be": "Belarusian", "bg": "Bulgarian", "ca": "Catalan", "el": "Greek",
    "es": "Spanish", "fr": "French", "ro": "Romanian", "ru": "Russian",
}  # fmt: skip
HELD_OUT_VOICES = ("en_GB", "es", "nb", "sv")
"""Languages whose digits are held out; relatives of each are heard."""
THINGS_HEARD, THINGS_ASKED = 60, 15
"""Things whose descriptions are heard in each language, and held out."""
KINDS = {"animals/birds": "bird", "animals/mammals": "mammal", "animals": "other animal", "": "thing"}
QUESTIONS = {
    "source": "What makes this sound?",
    "kind": "Is this a bird, a mammal, another animal or a thing?",
    "language": "Which language is this?",
    "digit": "Which digit is said?",
    "match": "Does this make the sound?",
}
CHANCE = {"kind": 1 / 4, "language": 1 / len(LANGUAGES), "digit": 1 / len(DIGITS), "match": 1 / 2}


@dataclass(frozen=True)
class Effect:
    """A sound effect of a stamp.

    Attributes:
        name: What makes the sound: ``mountain goat``.
        kind: One of ``KINDS``.
        wave: Its samples.
        picture: File of the drawing, None without.
    """

    name: str
    kind: str
    wave: Tensor
    picture: Path | None


def build_sounds(root: Path, target: Path) -> dict[str, int]:
    """Write clips, pictures and ``train.json`` and ``held_out.json`` to ``target``; returns samples by part and task.

    Raises:
        ShardError: there are no sounds below ``root``.
    """
    effects = find_effects(root)
    if not effects:
        raise ShardError(f"{root} holds no sound effects (an .ogg or .wav beside a .txt); is it the right folder?")
    writer = _Writer(target)
    _add_effects(writer, effects)
    _add_languages(writer, root)
    _add_digits(writer, root)
    return writer.finish()


def find_effects(root: Path) -> list[Effect]:
    """Sound effects below ``root``, ordered by path; letters, numbers and faces are left out, broken files too."""
    found = []
    for path in sorted([*root.rglob("*.ogg"), *root.rglob("*.wav")]):
        place = path.relative_to(root).as_posix()
        if "_desc" in path.stem or place.startswith("symbols/") or not path.with_suffix(".txt").exists():
            continue
        sound = _read(path)
        if sound is None:
            continue
        kind = next(kind for folder, kind in KINDS.items() if place.startswith(folder))
        drawings = [path.with_suffix(ending) for ending in (".png", ".svg")]
        picture = next((drawing for drawing in drawings if drawing.exists()), None)
        found.append(Effect(re.sub(r"[^a-z]+", " ", path.stem.lower()).strip(), kind, sound, picture))
    return found


def is_held_out(name: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a name belongs to the held-out part; depends on the name alone."""
    return hashlib.blake2b(name.encode(), digest_size=4).digest()[0] < 256 * share


def clips(sound: Tensor, number: int, generator: random.Random) -> Iterator[Tensor]:
    """Yield ``number`` clips of a sound, from its start and from elsewhere, each a little louder or softer."""
    size = round(CLIP_S * RATE)
    for place in range(number):
        last = max(0, len(sound) - size)
        start = 0 if place == 0 else generator.randint(0, last)
        gain = 1.0 if place == 0 else generator.uniform(0.5, 1.2)
        yield (sound[start : start + size] * gain).clamp(-1, 1)


def _add_effects(writer: _Writer, effects: Sequence[Effect]) -> None:
    generator = random.Random(0)
    pictured = [effect for effect in effects if effect.picture is not None]
    for number, effect in enumerate(effects):
        name = f"{number:03d}-{effect.name.replace(' ', '-')}"
        held_out = is_held_out(name)
        for clip in clips(effect.wave, 1 if held_out else NUM_VIEWS, generator):
            writer.add("held_out" if held_out else "train", "kind", f"kind-{name}", clip, effect.kind)
        cut = len(effect.wave) * 2 // 3
        if len(effect.wave) - cut < SHORTEST_S * RATE:
            continue
        for part, sound, views in (("train", effect.wave[:cut], NUM_VIEWS), ("held_out", effect.wave[cut:], 1)):
            for clip in clips(sound, views, generator):
                writer.add(part, "source", f"source-{name}", clip, effect.name)
                if effect.picture is None:
                    continue
                others = [other for other in pictured if other.name != effect.name]
                wrong = generator.choice(others) if others else effect
                for shown, answer in ((effect, "yes"), (wrong, "no")):
                    assert shown.picture is not None
                    writer.add(part, "match", f"match-{name}", clip, answer, picture=shown.picture)


def _add_languages(writer: _Writer, root: Path) -> None:
    """Descriptions of the same things in every language, so that things tell nothing."""
    spoken: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in sorted(root.rglob("*_desc_*.ogg")):
        thing, _, language = path.relative_to(root).with_suffix("").as_posix().rpartition("_desc_")
        if language in LANGUAGES:
            spoken[thing][language] = path
    whole = sorted(thing for thing, files in spoken.items() if len(files) == len(LANGUAGES))
    random.Random(0).shuffle(whole)
    num_asked = min(THINGS_ASKED, len(whole) // 4)
    for number, thing in enumerate(whole[: num_asked + THINGS_HEARD]):
        part = "held_out" if number < num_asked else "train"
        for language, path in spoken[thing].items():
            sound = _read(path)
            if sound is not None:
                writer.add(part, "language", f"language-{number}-{language}", sound, LANGUAGES[language])


def _add_digits(writer: _Writer, root: Path) -> None:
    generator = random.Random(1)
    for path in sorted((root / "symbols/math").glob("[0-9]*.ogg")):
        digit, _, language = path.stem.partition("_")
        sound = None if language.startswith("desc") or digit not in map(str, range(10)) else _read(path)
        if sound is None:
            continue
        part, views = ("held_out", 1) if language in HELD_OUT_VOICES else ("train", 3)
        for clip in clips(sound, views, generator):
            writer.add(part, "digit", f"digit-{path.stem}", clip, DIGITS[int(digit)])


def _read(path: Path) -> Tensor | None:
    """Samples of a file without silence before them; None for a file that is broken or holds next to nothing."""
    try:
        sound = AudioTransform(sample_rate=RATE, partial="allow")(path.read_bytes()).data
    except SampleError:
        return None
    loud = (sound.abs() > 0.02 * sound.abs().max()).nonzero()
    sound = sound[int(loud[0]) :] if len(loud) else sound[:0]
    return sound if len(sound) >= SHORTEST_S * RATE else None


class _Writer:
    """Clips and pictures as files, samples as LLaVA JSON."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._records: dict[str, list[dict[str, object]]] = {"train": [], "held_out": []}
        self._pictures: dict[Path, str] = {}
        (target / "sounds").mkdir(parents=True, exist_ok=True)

    def add(self, part: str, task: str, name: str, sound: Tensor, answer: str, *, picture: Path | None = None) -> None:
        """Add one question about a clip."""
        key = f"{part}-{len(self._records[part]):05d}-{name}"
        file = f"sounds/{key}.wav"
        samples = (sound[: round(CLIP_S * RATE)] * 32_767).round().short().numpy().tobytes()
        with wave.open(str(self._target / file), "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(RATE)
            out.writeframes(samples)
        shown = {} if picture is None else {"image": self._drawn(picture)}
        marks = "<audio>" if picture is None else "<image><audio>"
        turns = [{"from": "human", "value": f"{marks}\n{QUESTIONS[task]}"}, {"from": "gpt", "value": answer}]
        self._records[part].append({"id": key, "audio": file, **shown, "task": task, "conversations": turns})

    def finish(self) -> dict[str, int]:
        """Write the JSON; returns samples by part and task."""
        counts: dict[str, int] = defaultdict(int)
        for part, records in self._records.items():
            text = json.dumps(records, ensure_ascii=False, indent=1)
            (self._target / f"{part}.json").write_text(text + "\n", encoding="utf-8")
            for record in records:
                counts[f"{part} {record['task']}"] += 1
        return dict(counts)

    def _drawn(self, picture: Path) -> str:
        if picture not in self._pictures:
            name = f"pictures/{len(self._pictures):03d}.jpg"
            (self._target / "pictures").mkdir(exist_ok=True)
            render(picture).save(self._target / name, quality=92)
            self._pictures[picture] = name
        return self._pictures[picture]
