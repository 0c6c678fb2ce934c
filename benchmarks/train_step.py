"""A training step: ours beside LLaVA of transformers, with its Trainer and in a plain loop.

The same samples, the same weights, the same type, one machine; real tokens a second, the share of what the machine's
matrix multiplication allows, and the memory of a step. No data is loaded. ``--clock cpu`` counts the processor's time
instead of the wall's: with one thread (OMP_NUM_THREADS=1) other programs on the machine then hardly count.

    python benchmarks/train_step.py --rounds 3
    python benchmarks/train_step.py --visual-tokens 576 --mixes instruct
    python benchmarks/train_step.py --memory
    python benchmarks/train_step.py --compile --precision fp32 --clock cpu
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from steps import MIXES, Ours, PlainLoop, Runner, Sample, WithTrainer, draw_samples, make_ours, make_theirs, pack

from llava_scale.data.packing import TokenPool
from llava_scale.model import row_inputs
from llava_scale.training.cost import Work, model_cost

BASE = "transformers, loop"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def runners(options: argparse.Namespace) -> dict[str, Callable[[], Runner]]:
    """What is compared, by name; made when it is needed."""
    made: dict[str, Callable[[], Runner]] = {
        "transformers, Trainer": lambda: WithTrainer(options),
        BASE: lambda: PlainLoop(options),
        "ours": lambda: Ours(options),
    }
    if options.compile:
        made["ours, compiled"] = lambda: Ours(options, compiled=True)
    if options.memory:
        made["transformers, loop, recomputing"] = lambda: PlainLoop(options, checkpointing=True)
        made["ours, recomputing"] = lambda: Ours(options, checkpointing=True)
    return {name: make for name, make in made.items() if not options.only or name in options.only}


def time_steps(options: argparse.Namespace, mix: str) -> dict[str, Any]:
    """Real tokens a second of each runner, interleaved; and the ratio to the plain loop round by round."""
    made, clock = {name: make() for name, make in runners(options).items()}, CLOCKS[options.clock]
    warm, *rounds = [draw(options, mix, seed) for seed in range(options.rounds + 1)]
    losses = {name: runner.step(warm) for name, runner in made.items()}
    if options.compile:
        made["ours, compiled"].step(rounds[0])  # lengths become symbols here
    graphs = compiled_graphs()
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number, samples in enumerate(rounds):
        for name in list(made) if number % 2 else reversed(list(made)):
            start = clock()
            made[name].step(samples)
            seconds[name].append(clock() - start)
    tokens = [sum(len(sample.ids) for sample in samples) for samples in rounds]
    padded = [len(samples) * max(len(sample.ids) for sample in samples) for samples in rounds]
    ratios = {
        name: [other / own for own, other in zip(times, seconds[BASE], strict=True)] for name, times in seconds.items()
    }
    return {
        "mix": mix,
        "padding_efficiency": round(sum(tokens) / sum(padded), 3),
        "first_loss": losses,
        "tokens_per_s": {name: round(sum(tokens) / sum(times), 1) for name, times in seconds.items()},
        "against_loop": {name: [round(value, 2) for value in values] for name, values in ratios.items()},
        "median_against_loop": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
        "share_of_floor": share_of_floor(options, rounds, seconds),
        "recompiled": compiled_graphs() - graphs,
    }


def draw(options: argparse.Namespace, mix: str, seed: int) -> list[Sample]:
    """The samples of one step."""
    return draw_samples(options, mix, options.samples, seed)


def compiled_graphs() -> int:
    """Graphs that were compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def share_of_floor(
    options: argparse.Namespace, rounds: list[list[Sample]], seconds: dict[str, list[float]]
) -> dict[str, float]:
    """Time that the step's matrix operations would take at the measured peak, over the time that it took (medians)."""
    model, _ = make_ours(options, make_theirs(options))
    cost, peak = model_cost(model), matrix_peak(options)
    floors = []
    for samples in rounds:
        row = pack(samples)
        lengths = row.cu_seq_lens.diff().double()
        pictures = 0 if row.pixel_values is None else len(row.pixel_values)
        work = Work(
            tokens=float(lengths.sum()),
            squares=float(lengths.square().sum()),
            supervised=row.num_supervised,
            visual=row.num_visual_tokens,
            pictures=pictures,
        )
        floors.append(cost.flops(work) / peak)
    shares = {
        name: statistics.median(floor / own for floor, own in zip(floors, times, strict=True))
        for name, times in seconds.items()
    }
    return {"peak_gflops": round(peak / 1e9), **{name: round(value, 3) for name, value in shares.items()}}


def matrix_peak(options: argparse.Namespace) -> float:
    """Matrix operations a second of this machine in the type of the step: the best of some rounds of two shapes."""
    clock, dtype = CLOCKS[options.clock], torch.bfloat16 if options.precision == "bf16" else torch.float32
    best = 0.0
    for rows, width, out in ((2048, 2048, 2048), (2048, 576, 1536)):
        x, weight = torch.randn(rows, width, dtype=dtype), torch.randn(out, width, dtype=dtype)
        for _ in range(6):
            start = clock()
            torch.nn.functional.linear(x, weight)
            best = max(best, 2 * rows * width * out / (clock() - start))
    return best


@torch.no_grad()
def packed_against_separate(options: argparse.Namespace, mix: str) -> float:
    """Largest difference of a logit between samples packed in one row and alone, in float32."""
    model, _ = make_ours(options, make_theirs(options))
    model.eval()

    def logits(samples: list[Sample]) -> torch.Tensor:
        inputs = {**row_inputs(pack(samples)), "labels": None}
        found: torch.Tensor = model(**inputs).logits[0]
        return found

    samples = draw(options, mix, 0)
    together = logits(samples).split([len(sample.ids) for sample in samples])
    return max(float((part - logits([sample])).abs().max()) for part, sample in zip(together, samples, strict=True))


def rows_filled(options: argparse.Namespace, mix: str, row_length: int = 4096, count: int = 2000) -> float:
    """Share of the tokens of rows that samples of a mix fill, packed as in training."""
    lengths = [len(sample.ids) for sample in draw_samples(options, mix, count, 1)]
    pool, used, rows, number = TokenPool(row_length, 32), 0, 0, 0
    while number < count:
        while number < count and not pool.ready():
            pool.add(number, lengths[number])  # type: ignore[arg-type]  # it hands out what it was given
            number += 1
        if pool.ready():
            used += sum(lengths[place] for place in pool.take())  # type: ignore[call-overload]
            rows += 1
    return used / (rows * row_length)


def step_memory(options: argparse.Namespace, mix: str, name: str) -> float:
    """GiB that a step adds to a process that holds model and optimizer with its moments; in a process of its own."""
    runner = runners(options)[name]()
    samples = draw(options, mix, 0)
    runner.step(samples[:1])  # makes the moments, and needs less than all samples
    gc.collect()
    before = resident()
    runner.step(samples)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**30


def resident() -> float:
    """Bytes in memory now."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()


def compare_memory(options: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    """Memory of each runner and mix, each in a fresh process."""
    results = []
    for mix in options.mixes:
        found = {}
        for name in runners(options):
            command = [sys.executable, __file__, *arguments, "--one", json.dumps([mix, name])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = round(float(done.stdout.strip().splitlines()[-1]), 3)
        base = found.get(BASE)
        ratios = {name: round(value / base, 3) for name, value in found.items()} if base else {}
        results.append({"mix": mix, "gib": found, "against_loop": ratios})
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--samples", type=int, default=6, help="samples of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30, help="layers of the language model")
    parser.add_argument("--visual-tokens", type=int, default=144, choices=[144, 576], help="tokens of a picture")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--projector-only", action="store_true")
    parser.add_argument("--compile", action="store_true", help="also ours with compiled blocks")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--memory", action="store_true", help="memory of a step instead of its time")
    parser.add_argument("--checks", action="store_true", help="packed against separate logits, and how full rows are")
    parser.add_argument("--only", nargs="+", default=[], help="names of what to run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(step_memory(options, *json.loads(options.one)))
        return
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    print(platform.platform(), platform.processor(), f"{torch.get_num_threads()} threads", versions)
    print(json.dumps({name: value for name, value in vars(options).items() if name not in ("only", "one")}))
    if options.memory:
        results = compare_memory(options, sys.argv[1:])
    elif options.checks:
        results = [
            {
                "mix": mix,
                "packed_against_separate": packed_against_separate(options, mix),
                "rows_filled": round(rows_filled(options, mix), 4),
            }
            for mix in options.mixes
        ]
    else:
        results = [time_steps(options, mix) for mix in options.mixes]
    for result in results:
        print(json.dumps(result, indent=1), flush=True)


if __name__ == "__main__":
    main()
