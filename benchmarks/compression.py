"""What the compression benchmarks share: interleaved timing, peak memory of the CPU allocator, tables."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Sequence[torch.Tensor | None]]


def seconds(run: Run) -> float:
    """CPU time of one call, over all threads: other programs on the machine disturb it less than wall time."""
    start = time.process_time()
    run()
    return time.process_time() - start


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each run in each round, all in turn, backwards every other round; after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for number in range(rounds):
        for name in list(runs) if number % 2 == 0 else list(reversed(runs)):
            times[name].append(seconds(runs[name]))
    return times


def peak_bytes(run: Run) -> tuple[int, int]:
    """Most memory that torch held on the CPU during a call, above what it held before; and that of the results."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    results = sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor is not None)
    del kept
    held = most = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, results


def ratios(times: dict[str, list[float]], name: str, ours: str) -> str:
    """How much longer ``name`` took than ``ours``, round by round: median (lowest-highest)."""
    values = [other / own for other, own in zip(times[name], times[ours], strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def rows(
    label: str, runs: dict[str, Run], *, ours: str, rounds: int, input_bytes: int, memory: bool = True
) -> list[list[str]]:
    """A table row for each run: label, name, milliseconds, ratio to ours, memory over the size of the input.

    Memory is the peak with all results, and what it is above the results, which all runs must have.
    """
    times = interleaved(runs, rounds)
    table = []
    for name, run in runs.items():
        peak, results = peak_bytes(run) if memory else (0, 0)
        milliseconds = f"{1e3 * statistics.median(times[name]):.2f}"
        shown = [f"{peak / input_bytes:.3f}", f"{(peak - results) / input_bytes:.4f}"] if memory else ["", ""]
        table.append([label, name, milliseconds, ratios(times, name, ours), *shown])
        print("  ".join(table[-1]), flush=True)
    return table


def backward(forward: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Run:
    """Forward and backward pass for the inputs that want a gradient, with a gradient of ones."""
    leaves = [value for value in inputs if value.requires_grad]

    def run() -> Sequence[torch.Tensor | None]:
        out = forward(*inputs)
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return run


def without_graph(forward: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Run:
    """Forward pass that keeps nothing."""

    def run() -> Sequence[torch.Tensor | None]:
        with torch.no_grad():
            return (forward(*inputs),)

    return run


def arguments(text: str) -> argparse.Namespace:
    """Options of both benchmarks, with the number of threads put into force."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a hundredth of the size, to see that everything runs")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    return chosen
