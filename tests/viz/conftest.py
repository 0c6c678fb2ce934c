from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


def score(correct: int, total: int) -> dict[str, float]:
    value = correct / total
    return {"value": value, "low": value * 0.95, "high": min(1.0, value * 1.04), "correct": correct, "total": total}


def _write_run(
    folder: Path, *, name: str, lr: float = 1e-3, steps: int = 200, speed: float = 100.0, removed: float = 0.0
) -> Path:
    """A run folder as training writes it, with ``steps`` log lines of a falling loss."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {name}\nseed: 0\ntrain:\n  learning_rate: {lr}\n  steps: {steps}\n")
    lines = []
    for i in range(1, steps + 1):
        loss = 4.0 * math.exp(-i / 40) + 0.3 + 0.08 * math.sin(i * 7.3)
        line = {"step": 10 * i, "loss": loss, "lr": lr * (1 - i / steps), "grad_norm": 1 + math.sin(i) ** 2}
        line |= {"tokens_per_s": speed * 40 + 300 * math.sin(i), "samples_per_s": speed + 8 * math.cos(i)}
        line |= {"visual_tokens_before": 160 * 64 * i, "visual_tokens": round(160 * 64 * (1 - removed)) * i}
        line |= {"removed": removed, "data_wait": 0.02, "samples": 160 * i, "skipped": 0, "seconds": 1.2 * i}
        lines.append(line)
        if i % 50 == 0:
            lines.append({"step": 10 * i, "eval/loss": loss + 0.1, "eval/exact_match": 1 - math.exp(-i / 60)})
            lines[-1] |= {"eval/tokens": 900, "eval/samples": 60, "eval/seconds": 1.5}
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _write_evaluation(folder: Path, *, correct: int = 180) -> Path:
    """``eval.json`` with its pictures, as ``llava-scale eval`` writes it."""
    (folder / "pictures").mkdir(parents=True)
    examples = []
    for i, colour in enumerate(("red", "blue", "green", "orange", "purple", "gray")):
        Image.new("RGB", (160, 120), colour).save(folder / "pictures" / f"{i}.jpg")
        answer = colour if i % 2 else "yellow"
        example = {"key": f"test/{i:06d}", "question": "What colour is the <large> shape?", "gold": colour}
        examples.append(example | {"answer": answer, "correct": bool(i % 2), "task": "colour"})
        examples[-1]["pictures"] = [f"pictures/{i}.jpg"]
    tasks = {"colour": score(58, 60), "shape": score(55, 60), "count": score(37, 60), "relation": score(30, 60)}
    result = {
        "checkpoint": "runs/a/final",
        "data": "data/test",
        "loss": 0.4123,
        "exact_match": {"overall": score(correct, 240), "image": score(correct, 240), "text": score(20, 22)},
        "by_task": tasks,
        "blind": {"image": score(70, 240)},
        "blind_by_task": {"colour": score(15, 60), "shape": score(20, 60), "count": score(22, 60)},
        "blind_model": {"image": score(66, 240)},
        "blind_model_by_task": {"colour": score(12, 60), "shape": score(21, 60)},
        "ranking": {"top1": score(20, 40), "top5": score(33, 40), "chance_top1": 0.025, "chance_top5": 0.125},
        "examples": examples,
    }
    (folder / "eval.json").write_text(json.dumps(result))
    return folder / "eval.json"


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return _write_run


@pytest.fixture
def make_evaluation() -> Callable[..., Path]:
    return _write_evaluation


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = _write_run(tmp_path / "a", name="base")
    _write_evaluation(folder / "eval")
    return folder
