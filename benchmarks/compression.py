"""What the compression benchmarks share: interleaved timing and peak memory on a CPU or a CUDA device, tables."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from common import machine
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Sequence[torch.Tensor | None]]

REPEATS = 10
"""Calls behind each other on a CUDA device for one figure: a single one is mostly its launches."""


@dataclass(frozen=True)
class Meter:
    """Measures calls on one device.

    Attributes:
        device: Where they compute.
        rounds: Measurements of each.
    """

    device: torch.device
    rounds: int

    @property
    def place(self) -> str:
        """Machine, versions, and the device if it is no CPU."""
        if self.device.type == "cpu":
            return machine()
        return f"{machine()}; {torch.cuda.get_device_name(self.device)}"

    def seconds(self, run: Callable[[], object]) -> float:
        """Time of one call: on a CPU that of the processor, over all threads, which other programs disturb less."""
        if self.device.type == "cpu":
            start = time.process_time()
            run()
            return time.process_time() - start
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / REPEATS

    def interleaved(self, runs: Mapping[str, Callable[[], object]], rounds: int = 0) -> dict[str, list[float]]:
        """Seconds of each run in each round, all in turn, backwards every other round; after one call to warm up."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        for number in range(rounds or self.rounds):
            for name in list(runs) if number % 2 == 0 else list(reversed(runs)):
                times[name].append(self.seconds(runs[name]))
        return times

    def peak_bytes(self, run: Run) -> tuple[int, int]:
        """Most memory that torch held during a call, above what it held before; and that of the results."""
        gc.collect()
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            kept = run()
            return torch.cuda.max_memory_allocated(self.device) - before, _bytes_of(kept)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            kept = run()
        results = _bytes_of(kept)
        del kept
        held = most = 0
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most, results

    def rows(
        self, label: str, runs: dict[str, Run], *, ours: str, input_bytes: int, rounds: int = 0
    ) -> list[list[str]]:
        """A table row for each run: label, name, milliseconds, ratio to ours, memory over the size of the input.

        Memory is the peak with all results, and what it is above the results, which all runs must have.
        """
        times = self.interleaved(runs, rounds)
        table = []
        for name, run in runs.items():
            peak, results = self.peak_bytes(run)
            milliseconds = f"{1e3 * statistics.median(times[name]):.2f}"
            shown = [f"{peak / input_bytes:.3f}", f"{(peak - results) / input_bytes:.4f}"]
            table.append([label, name, milliseconds, ratios(times, name, ours), *shown])
            print("  ".join(table[-1]), flush=True)
        return table


def ratios(times: dict[str, list[float]], name: str, ours: str) -> str:
    """How much longer ``name`` took than ``ours``, round by round: median (lowest-highest)."""
    values = [other / own for other, own in zip(times[name], times[ours], strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


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


def arguments(text: str, *, widths: Sequence[int]) -> argparse.Namespace:
    """Options of the benchmarks of single operations, with the number of threads put into force."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for bfloat16 on a GPU")
    parser.add_argument("--widths", type=int, nargs="+", default=list(widths), help="of the tokens")
    parser.add_argument("--small", action="store_true", help="a hundredth of the size, to see that everything runs")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    return chosen


def _bytes_of(kept: Sequence[torch.Tensor | None]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor is not None)
