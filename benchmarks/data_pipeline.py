"""Samples/s, CPU time and memory of the whole data pipeline, ours beside the original way and five other loaders.

Each run: JPEG shards -> decode, pad to a square, resize to 336, tokens -> batches of 16 with 2 workers. Runs are
interleaved, each in a process of its own; pixels and tokens of each are compared with the original way's.

    python benchmarks/data_pipeline.py [--rounds 3] [--only 'ours, threads' webdataset]
"""

from __future__ import annotations

import argparse

from common import (
    chosen,
    hand_back,
    interleave,
    machine,
    measure,
    median,
    parser,
    passed_on,
    run_apart,
    save,
    spread,
    table,
)
from corpus import make

WARMUP = 8
"""Batches before the clock starts: more than all that the loaders prepare ahead."""
_LEFT = 0.13  # share of an epoch not consumed, so that no worker runs dry while the clock runs


def run_one(name: str, args: argparse.Namespace) -> None:
    """One measurement, in this process."""
    from peer import require
    from peers import PIPELINES
    from work import parity

    kind, work = PIPELINES[name]
    require(kind.needs)
    corpus = make(args.folder, args.samples, args.shards)
    kind.convert(corpus)
    peer = kind(corpus, work, workers=args.workers, batch=args.batch)
    batches = peer.batches()
    count = int(args.samples / args.batch * (1 - _LEFT)) - WARMUP
    figures = measure(batches, lambda batch: len(batch.keys), WARMUP, max(1, count))
    hand_back({**figures, **parity(corpus, next(batches))})


def report(results: dict[str, list[dict]]) -> str:
    """One line a pipeline; ratios are of medians."""
    base = results.get("ours, threads")
    rows = []
    for name, runs in results.items():
        slower = f"{median(base, 'samples_per_s') / median(runs, 'samples_per_s'):.2f}" if base else ""
        dearer = f"{median(runs, 'cpu_us') / median(base, 'cpu_us'):.2f}" if base else ""
        rows.append(
            [
                name,
                spread([run["samples_per_s"] for run in runs]),
                slower,
                spread([run["cpu_us"] for run in runs]),
                dearer,
                spread([run["pss_mb"] for run in runs]),
                f"{max(run['worst_level'] for run in runs):.2f} ({median(runs, 'mean_level'):.3f})",
                "yes" if all(run["same_tokens"] for run in runs) else "NO",
            ]
        )
    return table(
        [
            "pipeline",
            "samples/s",
            "ours is faster by",
            "CPU us/sample",
            "ours is cheaper by",
            "memory, MB",
            "worst (mean) level off",
            "same tokens",
        ],
        rows,
    )


def main() -> None:
    """Run all, print the table."""
    args = parser(__doc__.splitlines()[0]).parse_args()
    if args.run:
        run_one(args.run, args)
    from peers import PIPELINES

    names = chosen(PIPELINES, args.only)
    make(args.folder, args.samples, args.shards)
    results = interleave(
        names,
        args.rounds,
        lambda name: run_apart(__file__, [*passed_on(args), "--run", name], timeout_s=args.timeout),
    )
    print(f"\n{machine()}\n\n{report(results)}")
    save(args.json, results)


if __name__ == "__main__":
    main()
