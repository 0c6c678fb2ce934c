"""Samples/s of reading without decoding: key, parsed record and encoded picture of each sample, in one process.

python benchmarks/data_raw.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import time

from common import (
    chosen,
    hand_back,
    interleave,
    machine,
    median,
    parser,
    passed_on,
    run_apart,
    save,
    spread,
    table,
    tree_cpu_s,
)
from corpus import make

_LEAST_S = 1.0


def run_one(name: str, args: argparse.Namespace) -> None:
    """Whole passes for a second; the first pass is not counted."""
    from peer import require
    from peers import READERS
    from work import OurWork

    kind = READERS[name]
    require(kind.needs)
    corpus = make(args.folder, args.samples, args.shards)
    kind.convert(corpus)
    peer = kind(corpus, OurWork, workers=0, batch=args.batch)
    warm = sum(len(picture) for _, _, picture in peer.raw())
    if warm != sum(path.stat().st_size for path in corpus.images.glob("*.jpg")) and name != "Energon":
        raise SystemExit(f"{name} did not read every picture")  # Energon's stream is endless: no exact epoch
    cpu, start, num_samples = tree_cpu_s(), time.perf_counter(), 0
    while time.perf_counter() - start < _LEAST_S:
        num_samples += sum(1 for _ in peer.raw())
    seconds = time.perf_counter() - start
    hand_back({"samples_per_s": num_samples / seconds, "cpu_us": 1e6 * (tree_cpu_s() - cpu) / num_samples})


def main() -> None:
    """Run all, print the table."""
    args = parser(__doc__.splitlines()[0]).parse_args()
    if args.run:
        run_one(args.run, args)
    from peers import READERS

    make(args.folder, args.samples, args.shards)
    results = interleave(
        chosen(READERS, args.only),
        args.rounds,
        lambda name: run_apart(__file__, [*passed_on(args), "--run", name], timeout_s=args.timeout),
    )
    base = results.get("ours")
    rows = [
        [
            name,
            spread([run["samples_per_s"] for run in runs]),
            f"{median(base, 'samples_per_s') / median(runs, 'samples_per_s'):.1f}" if base else "",
            spread([run["cpu_us"] for run in runs]),
        ]
        for name, runs in results.items()
    ]
    print(f"\n{machine()}\n\n{table(['reader', 'samples/s', 'ours is faster by', 'CPU us/sample'], rows)}")
    save(args.json, results)


if __name__ == "__main__":
    main()
