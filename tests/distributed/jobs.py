"""What the processes of a test do."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from llava_scale.config.load import parse_config
from llava_scale.training import setup, trainer
from llava_scale.training.parallel import Ranks

NUMBERS = ("step", "loss", "grad_norm", "lr", "samples", "text_tokens", "visual_tokens", "supervised_tokens", "skipped")


def train(ranks: Ranks, tree: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Train as the config tree says.

    Options: ``resume``; ``stop_after`` a step, by a signal to the last rank.
    """
    media = {"with": 0, "without": 0, "image": 0, "video": 0, "audio": 0}
    backward = trainer.Trainer._backward

    def counting(self, row, num_tokens, *, last):
        inputs = {"image": row.pixel_values, "video": row.pixel_values_videos, "audio": row.audio_values}
        found = [kind for kind, values in inputs.items() if values is not None]
        for kind in (*found, "with" if found else "without"):
            media[kind] += 1
        if options.get("stop_after") == self.step + 1 and ranks.rank == ranks.size - 1 and not self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(self, row, num_tokens, last=last)

    trainer.Trainer._backward = counting
    try:
        config = parse_config(tree, origin="test")
        result = trainer.train(config, resume=options.get("resume", False), ranks=ranks)
    finally:
        trainer.Trainer._backward = backward
    return {"steps": result.steps, "stopped_by": result.stopped_by, "samples": result.samples, "rows": media}


def train_all(ranks: Ranks, runs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Several runs, one after the other."""
    return [train(ranks, tree, **options) for tree, options in runs]


def trained_lines(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The numbers in the log of a run."""
    text = (Path(tree["train"]["output_dir"]) / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: line[key] for key in NUMBERS} for line in lines if "lr" in line]


def held_out_losses(tree: dict[str, Any]) -> list[float]:
    """The held-out losses in the log of a run."""
    text = (Path(tree["train"]["output_dir"]) / "log.jsonl").read_text()
    return [line["eval/loss"] for line in map(json.loads, text.splitlines()) if "eval/loss" in line]


def different_weights(ranks: Ranks, strategy: str) -> str:
    """The error of ranks that did not build the same model."""
    import torch

    from llava_scale.config.train import ParallelConfig
    from llava_scale.errors import TrainingError
    from llava_scale.training.engine import make_engine

    torch.manual_seed(ranks.rank)
    blocks = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    model = torch.nn.ModuleDict({"language_model": torch.nn.ModuleDict({"layers": blocks})})
    config = ParallelConfig(strategy=strategy)  # type: ignore[arg-type]
    try:
        make_engine(model, ranks, torch.device("cpu"), config, half=False, compiled=False)
    except TrainingError as error:
        return str(error)
    return ""


def first_decides(ranks: Ranks) -> list[str]:
    """What each rank gets of the first one's value, of its error of ours, and of any other error."""

    def fail(error: Exception) -> Any:
        raise error

    found = [str(ranks.from_first(lambda: f"rank {ranks.rank}"))]
    for error in (setup.ConfigError("no such thing"), ZeroDivisionError("oh")):
        try:
            ranks.from_first(lambda error=error: fail(error))  # type: ignore[misc]
        except Exception as caught:
            found.append(f"{type(caught).__name__}: {caught}")
    return found


def train_with_trouble(ranks: Ranks, tree: dict[str, Any], trouble: str, step: int) -> dict[str, Any]:
    """Train, with trouble on the last rank alone: a ``full disk`` in the checkpoint, or a loss that is ``not finite``.

    Returns the error, or how many steps were left out.
    """
    from llava_scale.errors import LlavaScaleError
    from llava_scale.training import checkpoint

    real_write, real_backward = checkpoint.write_shards, trainer.Trainer._backward
    unlucky = ranks.rank == ranks.size - 1

    def write(folder, tensors, group):
        real_write(folder, tensors, group)
        if unlucky and trouble == "full disk" and f"step-{step:08d}" in str(folder):
            raise OSError(28, "No space left on device")

    def backward(self, row, num_tokens, *, last):
        poisoned = unlucky and trouble == "not finite" and self.step + 1 == step
        loss = real_backward(self, row, num_tokens, last=last)
        return loss * float("nan") if poisoned else loss

    checkpoint.write_shards, trainer.Trainer._backward = write, backward
    try:
        config = parse_config(tree, origin="test")
        return {"bad_steps": trainer.train(config, ranks=ranks).bad_steps}
    except LlavaScaleError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        checkpoint.write_shards, trainer.Trainer._backward = real_write, real_backward
