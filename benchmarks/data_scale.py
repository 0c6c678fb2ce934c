"""How the stream behaves at 100 million samples in 100,000 shards on 512 ranks with 8 workers each, simulated.

The data set's description is real (a ``dataset.json`` of that many shards is written and opened); indexes and texts are
made up when asked for. Order, mixing, planning, packing and state are the product's own. Prints tables; ``--json FILE``
also saves the figures.

    python benchmarks/data_scale.py [--samples 100000000] [--shards 100000] [--ranks 512] [--workers 8]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil

from llava_scale.config.data import DataConfig, PackingConfig, SourceConfig
from llava_scale.data.chat import EncodedText
from llava_scale.data.dataset import ShardedDataset, open_dataset
from llava_scale.data.loader import StreamingLoader
from llava_scale.data.manifest import MANIFEST, DatasetInfo
from llava_scale.data.order import Order
from llava_scale.data.planner import PlanState
from llava_scale.types import MediaInfo, MediaTokens, Turn

IMAGE = (MediaInfo(kind="image", width=500, height=375, num_frames=1),)


class SimulatedIndex:
    """Stands for the index of one shard: every sample has one picture."""

    tar_bytes = 1

    def __init__(self, name: str, num_samples: int) -> None:
        self.name = self.tar_sha256 = name
        self.num_samples = num_samples

    def media_infos_of(self, numbers: np.ndarray) -> list[tuple[MediaInfo, ...]]:
        """One picture for each of ``numbers``."""
        return [IMAGE] * len(numbers)


class SimulatedDataset(ShardedDataset):
    """A described data set whose shards do not exist."""

    def index(self, s: int) -> SimulatedIndex:
        """The made-up index of shard ``s``."""
        return SimulatedIndex(self.shard_name(s), len(self.shard_range(s)))

    def turns(self, i: int) -> tuple[Turn, ...]:
        """A text whose length depends on the number of the sample."""
        return (Turn("user", str(i)),)


class SimulatedEncoder:
    """Lengths like those of instruction data: log-normal with median 150, at most 1,400."""

    def __init__(self) -> None:
        self.placeholder_ids = {"image": 1, "video": 2, "audio": 3}
        lengths = np.random.default_rng(0).lognormal(5, 0.9, 1 << 16)
        self._ids = [[5] * min(1400, 1 + int(length)) for length in lengths]

    def encode(self, turns: tuple[Turn, ...]) -> EncodedText:
        """Ids of the length that the sample's number stands for."""
        return EncodedText(self._ids[int(turns[0].text) * 40503 % 65536], ())

    def fingerprint(self) -> str:
        """Constant."""
        return "simulated"


class SimulatedCounter:
    """144 tokens a picture."""

    def count(self, info: MediaInfo, *, step: int | None) -> MediaTokens:
        """The same at every step."""
        return MediaTokens(grid=(1, 12, 12), num_tokens=144)

    def fingerprint(self) -> str:
        """Constant."""
        return "144"


def write_description(folder: Path, num_samples: int, num_shards: int) -> None:
    """Write the ``dataset.json`` of shards that do not exist."""
    sizes = np.full(num_shards, num_samples // num_shards)
    sizes[: num_samples % num_shards] += 1
    info = DatasetInfo(
        names=tuple(f"shard-{number:06d}.tar" for number in range(num_shards)),
        num_samples=tuple(sizes.tolist()),
        num_bytes=(64_000_000,) * num_shards,
        sha256=tuple(f"{number:064x}" for number in range(num_shards)),
        modalities={"image": num_samples},
    )
    (folder / MANIFEST).write_bytes(info.to_bytes())


def open_simulated(folder: Path, args: argparse.Namespace) -> StreamingLoader:
    """Open the described data set as rank 0 of many."""
    dataset = open_dataset(str(folder))
    dataset.__class__ = SimulatedDataset
    config = DataConfig(
        sources=(SourceConfig(path=str(folder)),),
        packing=PackingConfig(row_length=args.row_length),
        cache_dir=str(folder / "cache"),
        num_workers=args.workers,
    )
    return StreamingLoader(
        [dataset],
        config,
        seed=0,
        rows_per_step=args.ranks,
        encoder=SimulatedEncoder(),
        counter=SimulatedCounter(),
        transforms={"image": lambda data: None},
        world_size=args.ranks,
    )


def measure_start(folder: Path, args: argparse.Namespace) -> tuple[dict[str, float], StreamingLoader]:
    """Seconds and memory from nothing to the plan of the first step, and to that of a step far inside."""
    process = psutil.Process()
    before = process.memory_info().rss
    start = time.perf_counter()
    stream = open_simulated(folder, args)
    opened = time.perf_counter()
    next(stream.plan.planner(PlanState.start(1)).steps())
    planned = time.perf_counter()
    deep = PlanState(10**6, 3, (int(3.37 * args.samples),), (int(3.37 * args.samples),))
    next(stream.plan.planner(deep).steps())
    figures = {
        "open, s": opened - start,
        "plan of the first step (lengths measured), s": planned - opened,
        "plan of a step in epoch 3, s": time.perf_counter() - planned,
        "memory added, MB": (process.memory_info().rss - before) / 1e6,
    }
    return figures, stream


def measure_planning(stream: StreamingLoader, args: argparse.Namespace, num_steps: int = 40) -> dict[str, float]:
    """Speed of planning, fill, and how evenly steps load ranks and workers."""
    steps = [plan for plan, _ in zip(stream.plan.planner(PlanState.start(1)).steps(), range(num_steps), strict=False)]
    start = time.process_time()
    for _ in zip(stream.plan.planner(PlanState.start(1)).steps(), range(num_steps), strict=False):
        pass
    seconds = time.process_time() - start
    samples = np.array([[len(row.samples) for row in plan.rows] for plan in steps])
    tokens = np.array([[sum(144 + s.text_length for s in row.samples) for row in plan.rows] for plan in steps])
    by_worker = samples[: num_steps // args.workers * args.workers].reshape(-1, args.workers, args.ranks).sum(0)
    stream._consumed = steps[-1]
    state = json.dumps(stream.state_dict())
    return {
        "planned samples/s (lengths cached)": samples.sum() / seconds,
        "fill of the rows": float(tokens.mean() / args.row_length),
        "fill of the emptiest row": float(tokens.min() / args.row_length),
        "tokens of a rank in a step, max / mean": float((tokens.max(1) / tokens.mean(1)).mean()),
        "samples of a rank over all steps, max / mean": float(samples.sum(0).max() / samples.sum(0).mean()),
        "samples of a worker over all steps, max / mean": float(by_worker.max() / by_worker.mean()),
        "state, bytes of JSON": float(len(state)),
    }


def measure_shuffle(args: argparse.Namespace, block_size: int, window_blocks: int, batch: int) -> dict[str, float]:
    """Quality of the order against a uniform permutation (where every figure is 1)."""
    order = Order(args.samples, 0, block_size, window_blocks)
    size = args.samples
    starts = np.random.default_rng(1).integers(0, size - batch, 64)
    batches = np.stack([order.samples(int(start), int(start) + batch) for start in starts])
    distance = np.abs(batches - (starts[:, None] + np.arange(batch))).mean() / size
    shard = batches * args.shards // size
    distinct = np.mean([len(np.unique(row)) for row in shard])
    expected = args.shards * (1 - (1 - 1 / args.shards) ** batch)
    feature = np.random.default_rng(2).standard_normal(args.shards)  # something that all samples of a shard share
    variance = feature[shard].mean(1).var() * batch
    return {
        "distance moved": distance * 3,
        "shards in a batch": distinct / expected,
        "variance of a batch's mean": variance,
    }


def print_table(title: str, figures: dict[str, float]) -> None:
    """Print one figure a line."""
    print(f"\n{title}")
    for name, value in figures.items():
        print(f"  {name:<50} {value:>14,.4g}" if abs(value) < 1000 else f"  {name:<50} {value:>14,.0f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SimpleNamespace(
        samples=10**8, shards=10**5, ranks=512, workers=8, row_length=4096, batch=4096
    ).__dict__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    print(f"{args.samples:,} samples, {args.shards:,} shards, {args.ranks} ranks x {args.workers} workers")
    print(f"Python {platform.python_version()}, {platform.machine()}, {psutil.cpu_count()} cores")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_description(folder, args.samples, args.shards)
        results["start"], stream = measure_start(folder, args)
        print_table("Start", results["start"])
        results["planning"] = measure_planning(stream, args)
        print_table(f"Planning, {args.ranks} rows of {args.row_length} tokens a step", results["planning"])
    for block_size, window_blocks in ((64, 16), (64, 64), (16, 64), (8, 128), (1, 1024)):
        label = f"blocks of {block_size}, windows of {window_blocks} blocks"
        results[label] = measure_shuffle(args, block_size, window_blocks, args.batch)
        print_table(f"Shuffle, {label}, batch {args.batch} (uniform permutation: 1)", results[label])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
