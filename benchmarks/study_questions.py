"""Held-out questions of the study on synthetic pictures, sorted by what they need.

Fine detail: counting, sizes, looks of small things. Pointing: in pictures of three things, only the question says
which one is meant. The whole: captions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from llava_scale.data.toy import questions as ask
from llava_scale.data.toy.questions import Question
from llava_scale.data.toy.scenes import Scene, draw_scene, encode, render

Asker = Callable[[random.Random, Scene], Question | None]

DETAIL: dict[str, Asker] = {
    "count": ask.ask_count,
    "size": ask.ask_size,
    "color of a small thing": ask.ask_color,
    "shape of a small thing": ask.ask_shape,
}
POINTING: dict[str, Asker] = {
    "color of one of three": ask.ask_color,
    "shape of one of three": ask.ask_shape,
    "place of one of three": ask.ask_position,
    "neighbour of one of three": ask.ask_relation,
}
WHOLE: dict[str, Asker] = {"caption": lambda rng, scene: ask.caption_of(scene)}
GROUPS: dict[str, dict[str, Asker]] = {"fine detail": DETAIL, "pointing": POINTING, "the whole": WHOLE}
"""Tasks by what they need."""


def suits(task: str, scene: Scene) -> bool:
    """Whether a scene is one that the task is about."""
    if "small thing" in task:
        return len(scene) >= 2 and all(thing.size == "small" for thing in scene)
    return len(scene) == 3 if "of three" in task else len(scene) >= 2


def write_questions(folder: Path, *, per_task: int, seed: int = 7) -> Path:
    """Write ``questions.json`` with pictures beside it, ``per_task`` of each task, and return its path."""
    (folder / "questions").mkdir(parents=True, exist_ok=True)
    records = []
    for task, asker in (item for group in GROUPS.values() for item in group.items()):
        rng = random.Random(f"{seed}/{task}")
        number = 0
        while number < per_task:
            scene = draw_scene(rng, "test")
            question = asker(rng, scene) if suits(task, scene) else None
            if question is None:
                continue
            name = f"{task.replace(' ', '-')}-{number:04d}"
            picture = f"questions/{name}.png"
            (folder / picture).write_bytes(encode(render(scene, rng), "png"))
            turns = [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": question.answer}]
            records.append({"id": name, "image": picture, "task": task, "conversations": turns})
            number += 1
    path = folder / "questions.json"
    path.write_text(json.dumps(records, indent=1))
    return path
