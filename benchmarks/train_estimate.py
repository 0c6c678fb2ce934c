"""Estimated memory of a training process beside the memory that one really takes, on a CPU.

Each row is a process of its own: model, optimizer and two steps on one packed row. Measured is the highest resident
memory above that of the process before the model was made.

    python benchmarks/train_estimate.py
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys

import torch
from steps import draw_samples, our_config, pack
from train_step import resident

from llava_scale.config.load import parse_config
from llava_scale.model import LlavaScaleForConditionalGeneration, row_inputs
from llava_scale.training.estimate import rank_memory
from llava_scale.training.optim import build_optimizer, clip_gradients, step_where
from llava_scale.training.recipe import apply_recipe, plan_recipe, set_training_modes

CASES = {
    "all but the tower, fp32": {"precision": "fp32"},
    "all but the tower, bf16": {"precision": "bf16"},
    "recomputing, fp32": {"precision": "fp32", "gradient_checkpointing": True},
    "recomputing, bf16": {"precision": "bf16", "gradient_checkpointing": True},
    "projector only, fp32": {"precision": "fp32", "stage": "align"},
    "projector only, bf16": {"precision": "bf16", "stage": "align"},
    "576 tokens a picture, fp32": {"precision": "fp32", "visual_tokens": 576},
    "chunked logits, fp32": {"precision": "fp32", "loss_chunk": 128},
    "Muon, fp32": {"precision": "fp32", "optimizer": "muon"},
}


def run_one(options: argparse.Namespace, case: dict[str, object]) -> tuple[float, float]:
    """Estimated and measured bytes of one case."""
    options.visual_tokens = case.get("visual_tokens", 144)
    train = {key: value for key, value in case.items() if key != "visual_tokens"}
    config = parse_config({"model": {"preset": "tiny"}, "train": train}, origin="benchmark")
    half = train["precision"] == "bf16"
    row = pack(draw_samples(options, "instruct", options.samples))
    inputs, tokens, supervised = row_inputs(row), int(row.cu_seq_lens[-1]), row.num_supervised
    with torch.device("meta"):
        empty = LlavaScaleForConditionalGeneration(our_config(options))
    apply_recipe(empty, plan_recipe(empty, config.train))
    memory = rank_memory(empty, config, num_ranks=1, row_tokens=tokens, supervised=supervised, half=half)
    gc.collect()
    before = resident()
    model = LlavaScaleForConditionalGeneration(our_config(options))
    recipe = plan_recipe(model, config.train)
    apply_recipe(model, recipe)
    if config.train.gradient_checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        set_training_modes(model)
    optimizer = build_optimizer(model, recipe, config.train)
    trained = [value for value in model.parameters() if value.requires_grad]
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = model(**inputs, num_items_in_batch=supervised, loss_chunk=config.train.loss_chunk).loss
        loss.backward()
        step_where(optimizer, torch.isfinite(clip_gradients(trained, 1.0)))
        optimizer.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(memory, file=sys.stderr)
    return memory.total, peak


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="layers of the language model")
    parser.add_argument("--samples", type=int, default=12, help="samples in the row")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options, CASES[options.one])))
        return
    print(f"| case | estimated MiB | measured MiB | ratio |\n{'|---' * 4}|")
    for name in options.cases:
        command = [sys.executable, __file__, "--layers", str(options.layers), "--samples", str(options.samples)]
        done = subprocess.run([*command, "--one", name], capture_output=True, text=True, check=True)
        estimated, measured = json.loads(done.stdout.strip().splitlines()[-1])
        print(
            f"| {name} | {estimated / 2**20:,.0f} | {measured / 2**20:,.0f} | {estimated / measured:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
