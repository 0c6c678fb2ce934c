"""How long a checkpoint holds up training: written at once, and in the background.

python benchmarks/train_checkpoint.py --mb 400 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from llava_scale.config import TrainConfig
from llava_scale.training.checkpoint import CheckpointWriter, TrainerState
from llava_scale.training.optim import build_optimizer
from llava_scale.training.recipe import apply_recipe, plan_recipe


def make_run(megabytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose checkpoint takes ``megabytes``: weights and two moments, in eight tensors each."""
    side = int((megabytes * 1e6 / 3 / 8 / 4) ** 0.5)
    layers = {f"layer{number}": nn.Linear(side, side, bias=False) for number in range(8)}
    model = nn.ModuleDict({"language_model": nn.ModuleDict(layers)})
    recipe = plan_recipe(model, TrainConfig())
    apply_recipe(model, recipe)
    optimizer = build_optimizer(model, recipe, TrainConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer


def state_at(step: int) -> TrainerState:
    """A state with nothing in it."""
    return TrainerState(step=step, total_steps=9, loader={}, counters={}, random=[{}], frozen="", config={})


def stall(folder: Path, megabytes: int, *, rounds: int, in_background: bool) -> tuple[list[float], list[float]]:
    """Seconds until ``save`` returns, and until the checkpoint is whole, for each round."""
    model, optimizer = make_run(megabytes)
    writer = CheckpointWriter(folder, keep=1, in_background=in_background)
    returned, whole = [], []
    for step in range(1, rounds + 1):
        start = time.perf_counter()
        writer.save(state_at(step), model=model, optimizer=optimizer)
        returned.append(time.perf_counter() - start)
        writer.wait()
        whole.append(time.perf_counter() - start)
    return returned, whole


def main() -> None:
    """Measure and print medians with lowest and highest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the temporary folder if not given")
    options = parser.parse_args()
    result = {}
    for name, in_background in (("at once", False), ("in the background", True)):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            returned, whole = stall(Path(folder), options.mb, rounds=options.rounds, in_background=in_background)
        result[name] = {
            "stall_s": [round(value, 3) for value in (statistics.median(returned), min(returned), max(returned))],
            "whole_s": [round(value, 3) for value in (statistics.median(whole), min(whole), max(whole))],
        }
    ratio = result["in the background"]["stall_s"][0] / result["at once"]["stall_s"][0]
    print(json.dumps({"mb": options.mb, **result, "stall_ratio": round(ratio, 3)}, indent=1))


if __name__ == "__main__":
    main()
