"""What tasks found, and its files: ``tasks.json``, ``answers-NAME.jsonl`` and ``task_pictures/``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_scale.config import to_dict
from llava_scale.data.files import write_atomic
from llava_scale.errors import ConfigError

if TYPE_CHECKING:
    from llava_scale.eval.result import Example
    from llava_scale.eval.scorers import Response, Score, Scored
    from llava_scale.eval.task_data import TaskItem
    from llava_scale.eval.task_file import TaskConfig
    from llava_scale.types import SkippedSample

FORMAT = 1
"""Version of ``tasks.json``; grows when the meaning of a field changes."""

PICTURES = "task_pictures"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """Scores of one model on one task.

    Attributes:
        task: What was asked.
        num_samples: Samples that were used.
        num_cached: Answers that were there already.
        items: Questions, in the order of the data, without media.
        responses: What the model said to each.
        scored: Scores and points of each answer.
        examples: Answers to look at; wrong ones are favoured.
        skipped: Samples that could not be used.
        seconds: Time it took.
    """

    task: TaskConfig
    num_samples: int
    num_cached: int
    items: Sequence[TaskItem]
    responses: Sequence[Response]
    scored: Scored
    examples: tuple[Example, ...] = ()
    skipped: tuple[SkippedSample, ...] = ()
    seconds: float = 0.0

    @property
    def scores(self) -> dict[str, Score]:
        """Scores by name, the task's own first."""
        return self.scored.scores

    def to_json(self) -> dict[str, Any]:
        """As written to ``tasks.json``."""
        return {
            "name": self.task.name,
            "data": self.task.data,
            "scorer": self.task.scorer,
            "num_samples": self.num_samples,
            "num_answers": len(self.items),
            "num_cached": self.num_cached,
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "skipped": [{"shard": item.shard, "key": item.key, "reason": item.reason} for item in self.skipped],
            "seconds": round(self.seconds, 2),
            "settings": to_dict(self.task),
        }

    def lines(self) -> str:
        """Every answer as a line of JSON."""
        return "".join(
            json.dumps(
                {
                    "key": item.key,
                    "question": item.question.text,
                    "references": list(item.references),
                    "answer": answer,
                    "points": points,
                    **({"scores": list(response.scores)} if item.choices else {}),
                },
                ensure_ascii=False,
            )
            + "\n"
            for item, response, answer, points in zip(
                self.items, self.responses, self.scored.answers, self.scored.points, strict=True
            )
        )


def write_tasks(results: Sequence[TaskResult], folder: str | Path, *, checkpoint: str, digest: str) -> Path:
    """Write the results into ``folder`` and return the path of ``tasks.json``.

    Raises:
        ConfigError: the folder cannot be written.
    """
    target = Path(folder) / "tasks.json"
    pictures = target.parent / PICTURES
    content: dict[str, Any] = {"format": FORMAT, "checkpoint": checkpoint, "digest": digest, "tasks": []}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # never beside the pictures of another evaluation
        shutil.rmtree(pictures, ignore_errors=True)
        for number, result in enumerate(results):
            (target.parent / f"answers-{_file_name(result.task.name)}.jsonl").write_text(result.lines(), "utf-8")
            examples = [_example(example, pictures, f"{number:02d}") for example in result.examples]
            content["tasks"].append({**result.to_json(), "examples": examples})
        write_atomic(target, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"cannot write into {target.parent}: {error.strerror}; choose another --out") from None
    return target


def _example(example: Example, pictures: Path, prefix: str) -> dict[str, Any]:
    names = []
    for data in example.pictures:
        pictures.mkdir(exist_ok=True)
        name = f"{prefix}-{len(list(pictures.iterdir())):04d}.jpg"
        (pictures / name).write_bytes(data)
        names.append(f"{PICTURES}/{name}")
    fields = ("key", "task", "modality", "question", "gold", "answer", "correct")
    return {**{name: getattr(example, name) for name in fields}, "pictures": names}


def _file_name(name: str) -> str:
    return "".join(char if char.isalnum() or char in "-_." else "_" for char in name)
