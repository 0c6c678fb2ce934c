"""Milliseconds from opening the loader to the first batch after a resume, by where the run was cut.

Each loader runs to the cut in one process and saves its state; another process opens it, loads the state and waits for
the first batch (imports are not counted). The batch is compared with the one that the first process got next. All do
the same work with a sample, ours, so that what differs is the resuming.

    python benchmarks/data_resume.py [--cuts 5 60 110] [--rounds 3]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import chosen, hand_back, interleave, machine, median, parser, passed_on, run_apart, save, spread, table
from corpus import make


def cut(name: str, args: argparse.Namespace) -> None:
    """Run to the cut, save the state and the keys of the batch after it."""
    from peer import require
    from peers import RESUMERS
    from work import OurWork

    require(RESUMERS[name].needs)
    corpus = make(args.folder, args.samples, args.shards)
    RESUMERS[name].convert(corpus)
    peer = RESUMERS[name](corpus, OurWork, workers=args.workers, batch=args.batch)
    batches = peer.batches()
    for _ in range(args.cut):
        next(batches)
    state = peer.state(args.cut)
    args.state.write_bytes(state)
    hand_back({"state_bytes": len(state), "next_keys": next(batches).keys})


def resume(name: str, args: argparse.Namespace) -> None:
    """Open, load, wait for the first batch."""
    from peer import require
    from peers import RESUMERS
    from work import OurWork

    require(RESUMERS[name].needs)
    corpus = make(args.folder, args.samples, args.shards)
    state = args.state.read_bytes()
    work = OurWork(corpus)  # imports all of it
    del work
    start = time.perf_counter()
    peer = RESUMERS[name](corpus, OurWork, workers=args.workers, batch=args.batch)
    peer.load(state)
    keys = next(peer.batches()).keys
    hand_back({"first_batch_ms": 1e3 * (time.perf_counter() - start), "keys": keys})


def run_both(name: str, number: int, args: argparse.Namespace) -> dict | str:
    """Cut and resume one loader."""
    state = args.folder / "state"
    common = [*passed_on(args), "--cut", str(number), "--state", str(state), "--run", name]
    before = run_apart(__file__, [*common, "--phase", "cut"], timeout_s=args.timeout)
    if isinstance(before, str):
        return before
    after = run_apart(__file__, [*common, "--phase", "resume"], timeout_s=args.timeout)
    if isinstance(after, str):
        return after
    return {
        "first_batch_ms": after["first_batch_ms"],
        "state_bytes": before["state_bytes"],
        "exact": after["keys"] == before["next_keys"],
    }


def report(results: dict[int, dict[str, list[dict]]]) -> str:
    """A line a loader, a column a cut."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    rows = []
    for name in names:
        found = [results[number].get(name, []) for number in results]
        every = [run for runs in found for run in runs]
        shown = [spread([run["first_batch_ms"] for run in runs]) if runs else "" for runs in found]
        exact = f"{sum(run['exact'] for run in every)} of {len(every)}"
        rows.append([name, *shown, f"{median(every, 'state_bytes'):,.0f}", exact])
    header = ["loader", *(f"cut after {number} batches, ms" for number in results), "state, bytes", "next batch exact"]
    return table(header, rows)


def main() -> None:
    """Run all, print the table."""
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--cuts", type=int, nargs="+", default=[5, 60, 110])
    made.add_argument("--cut", type=int, default=0, help=argparse.SUPPRESS)
    made.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--phase", choices=("cut", "resume"), help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.run:
        (cut if args.phase == "cut" else resume)(args.run, args)
    from peers import RESUMERS

    make(args.folder, args.samples, args.shards)
    results = {}
    for number in args.cuts:
        print(f"cut after {number} batches", flush=True)
        results[number] = interleave(
            chosen(RESUMERS, args.only), args.rounds, lambda name, number=number: run_both(name, number, args)
        )
    print(f"\n{machine()}\n\n{report(results)}")
    save(args.json, results)


if __name__ == "__main__":
    main()
