"""What the data benchmarks share: measuring a run, running each in a process of its own, interleaving, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

SKIPPED = 3
"""Exit status of a run whose library cannot be imported."""

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "pillow",
    "simplejpeg",
    "webdataset",
    "megatron-energon",
    "mosaicml-streaming",
    "litdata",
)


def tree_cpu_s() -> float:
    """CPU seconds of this process and everything below it, living or gone."""
    import psutil

    process = psutil.Process()
    own = process.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in process.children(recursive=True):
        try:
            used = child.cpu_times()
        except psutil.Error:
            continue
        total += used.user + used.system + used.children_user + used.children_system
    return total


def tree_pss_mb() -> float:
    """Memory of this process and everything below it; what several share counts once."""
    import psutil

    process = psutil.Process()
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e6


def measure(batches: Iterator[Any], size_of: Callable[[Any], int], warmup: int, count: int) -> dict[str, float]:
    """Samples/s, CPU us a sample and memory of ``count`` batches, after ``warmup`` that fill the buffers."""
    for _ in range(warmup):
        next(batches)
    cpu, start, num_samples = tree_cpu_s(), time.perf_counter(), 0
    for _ in range(count):
        num_samples += size_of(next(batches))
    seconds = time.perf_counter() - start
    cpu = tree_cpu_s() - cpu
    return {
        "samples_per_s": num_samples / seconds,
        "cpu_us": 1e6 * cpu / num_samples,
        "pss_mb": tree_pss_mb(),
        "num_samples": num_samples,
    }


def run_apart(script: str, arguments: Iterable[str], *, timeout_s: float) -> dict[str, Any] | str:
    """Result of ``script`` in a new process: what it handed to ``hand_back``, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        environment = {**os.environ, "BENCHMARK_RESULT": str(result), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("wb") as output:
            try:
                done = subprocess.run(
                    [sys.executable, script, *arguments],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    timeout=timeout_s,
                )
            except subprocess.TimeoutExpired:
                return f"no end after {timeout_s:.0f} s"
        if result.exists():
            return json.loads(result.read_text())
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        if os.environ.get("BENCHMARK_VERBOSE"):
            print("\n".join(lines[-40:]))
        return lines[-1] if done.returncode == SKIPPED else f"failed ({done.returncode}): {lines[-1]}"


def hand_back(result: dict[str, Any]) -> None:
    """Give the result of this run to ``run_apart``, and end at once: some libraries hang when they are torn down."""
    import psutil

    Path(os.environ["BENCHMARK_RESULT"]).write_text(json.dumps(result))
    for child in psutil.Process().children(recursive=True):
        child.kill()
    sys.stdout.flush()
    os._exit(0)


def interleave(
    names: list[str], rounds: int, run: Callable[[str], dict[str, Any] | str]
) -> dict[str, list[dict[str, Any]]]:
    """Run everything ``rounds`` times in turn, backwards every other round; what is skipped once is left out."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    left_out: set[str] = set()
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            if name in left_out:
                continue
            load = os.getloadavg()[0]
            result = run(name)
            if isinstance(result, str):
                print(f"round {number + 1}: {name}: skipped: {result}", flush=True)
                left_out.add(name)
                continue
            results[name].append({**result, "load": load})
            shown = ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, float))
            print(f"round {number + 1}: {name}: {shown}", flush=True)
    return {name: values for name, values in results.items() if values}


def spread(values: list[float]) -> str:
    """``median (lowest-highest)``."""
    if len(values) == 1:
        return f"{values[0]:,.0f}"
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


def median(runs: list[dict[str, Any]], key: str) -> float:
    """Median of one figure over runs."""
    return statistics.median(run[key] for run in runs)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Processor, cores, load and versions, in one paragraph."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} missing")
    return (
        f"{time.strftime('%Y-%m-%d')}, {model}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, "
        f"Linux {platform.release()}, Python {platform.python_version()}; {', '.join(versions)}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def parser(text: str) -> argparse.ArgumentParser:
    """The options that all data benchmarks have."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--folder", type=Path, default=Path("/tmp/llava-scale-benchmark"), help="where the corpus lies")
    made.add_argument("--samples", type=int, default=2000)
    made.add_argument("--shards", type=int, default=16)
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--only", nargs="*", default=None, help="names of the runs wanted")
    made.add_argument("--json", type=Path, default=None, help="also save every run's figures here")
    made.add_argument("--timeout", type=float, default=300.0, help="seconds for one run")
    made.add_argument("--run", default="", help=argparse.SUPPRESS)
    return made


def passed_on(args: argparse.Namespace) -> list[str]:
    """The arguments with which a run's own process is started."""
    names = ("folder", "samples", "shards", "workers", "batch")
    return [text for name in names for text in (f"--{name}", str(getattr(args, name)))]


def chosen(names: Iterable[str], only: list[str] | None) -> list[str]:
    """The runs asked for, in order."""
    known = list(names)
    if only is None:
        return known
    unknown = set(only) - set(known)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return [name for name in known if name in only]


def save(path: Path | None, results: Any) -> None:
    """Keep every run's figures."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "runs": results}, indent=1) + "\n")
