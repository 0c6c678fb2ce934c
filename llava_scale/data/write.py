"""Pack LLaVA JSON and media files into shards: parallel, repeatable byte for byte, and safe to interrupt.

Records are dealt to shards before any work starts, so a shard's content depends neither on the number of workers nor
on the order in which they finish. ``OUT/.pack/plan.json`` remembers input and options; running the same command
again keeps the shards that are whole and writes the rest.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_scale.data.engines import run_tasks
from llava_scale.data.files import remove_leftovers, try_locked, write_atomic
from llava_scale.data.index import ShardIndex
from llava_scale.data.manifest import MANIFEST, DatasetInfo
from llava_scale.data.opening import load_index
from llava_scale.data.pack_plan import BadRecord, Plan, make_plan
from llava_scale.data.pack_shard import ShardTask, pack_shard, read_bad
from llava_scale.data.prepare import MediaOptions
from llava_scale.errors import ConfigError, ShardError

if TYPE_CHECKING:
    from collections.abc import Callable

    from llava_scale.data.engines import Engine

REPORT = "pack-report.jsonl"
_STATE = ".pack"
_SHARD_FILE = re.compile(r"^shard-\d{5,}\.(tar|index)$")
_LOCK_WAIT_S = 5.0
_WORKERS_WAIT_S = 60.0  # of a run that was killed: they end by themselves, later on a busy machine


@dataclass(frozen=True, slots=True, kw_only=True)
class PackResult:
    """What ``pack`` did.

    Attributes:
        num_samples: Samples in all shards.
        num_shards: Shards in the folder.
        num_kept: Shards that an earlier run had already written.
        num_bytes: Bytes of all tars.
        bad: Records that were left out, by record number; also listed in ``report``.
        report: ``pack-report.jsonl``: one object a bad record.
        seconds: Time it took.
    """

    num_samples: int
    num_shards: int
    num_kept: int
    num_bytes: int
    bad: tuple[BadRecord, ...]
    report: Path
    seconds: float


def pack(
    source: Path,
    out: Path,
    *,
    media_root: Path,
    shard_size: int = 1000,
    options: MediaOptions | None = None,
    workers: int = 1,
    engine: Engine = "pool",
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackResult:
    """Write the samples of a LLaVA JSON or JSONL file into shards with indexes and ``dataset.json``.

    Args:
        source: Input; see ``pack_plan.make_plan``.
        out: Folder for the shards.
        media_root: Folder that media paths are relative to.
        shard_size: Records dealt to each shard; bad ones among them leave it smaller.
        options: What happens to media; by default they are checked and copied byte for byte.
        workers: Processes (``pool``) or tasks at a time (``ray``; 0 leaves it to the cluster).
        engine: ``pool`` on this machine, ``ray`` on a cluster that shares ``out`` and ``media_root``.
        overwrite: Replace a folder that was packed from other input or with other options.
        on_progress: Called with (records done, records in all) whenever a shard is finished.

    Raises:
        ShardError: unreadable input, nothing to pack, an ``out`` that holds something else, or one that another
            process is writing.
    """
    if shard_size < 1:
        raise ConfigError(f"shard size must be at least 1, got {shard_size}")
    started = time.perf_counter()
    options = options or MediaOptions()
    plan = make_plan(source, media_root)
    state = out / _STATE
    state.mkdir(parents=True, exist_ok=True)
    with try_locked(state / "lock", wait_s=_LOCK_WAIT_S) as free:
        if not free:
            raise ShardError(f"{out}: another process is packing into this folder; wait for it, or choose another")
        _wait_for_workers(out, state / "workers")
        _claim(out, _identity(plan, media_root, shard_size, options), overwrite=overwrite)
        tasks = _deal(plan, out, media_root, shard_size, options)
        kept, todo = _sort_out(tasks)
        for stale in [MANIFEST, REPORT] if todo else []:
            (out / stale).unlink(missing_ok=True)
        done_records = sum(len(task.samples) for task in kept)
        on_progress(done_records, len(plan.samples))
        packed = run_tasks(pack_shard, todo, engine=engine, workers=workers, workers_lock=state / "workers")
        for task, _ in packed:
            done_records += len(task.samples)
            on_progress(done_records, len(plan.samples))
        return _finish(out, plan, tasks, options, num_kept=len(kept), started=started)


def _wait_for_workers(out: Path, lock: Path) -> None:
    """Return when no worker process of an earlier run is left that could still write a shard."""
    with try_locked(lock, wait_s=_WORKERS_WAIT_S) as free:
        if not free:
            raise ShardError(f"{out}: worker processes of an earlier run still write into this folder; end them first")


def _identity(plan: Plan, media_root: Path, shard_size: int, options: MediaOptions) -> dict[str, Any]:
    """Return what must not change between runs that continue each other."""
    settings = {"media_root": str(media_root.resolve()), "shard_size": shard_size, **asdict(options)}
    return json.loads(json.dumps({"input_sha256": plan.fingerprint, **settings}))  # type: ignore[no-any-return]


def _claim(out: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
    """Make ``out`` ours: continue a run with the same identity, start in an empty folder, or refuse."""
    remove_leftovers(out)
    path = out / _STATE / "plan.json"
    present = [file for file in out.iterdir() if _SHARD_FILE.match(file.name) or file.name == MANIFEST]
    try:
        known = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        known = None
    if known == identity and not overwrite:
        return
    if present and not overwrite:
        raise ShardError(
            f"{out}: {_difference(known, identity)}; choose another folder, or replace it with --overwrite"
        )
    for file in present:
        file.unlink()
    for file in (out / _STATE).glob("*.bad.json"):
        file.unlink()
    write_atomic(path, (json.dumps(identity, indent=1) + "\n").encode())


def _difference(known: dict[str, Any] | None, identity: dict[str, Any]) -> str:
    if known is None:
        return "already holds shards that this command did not write"
    changed = sorted(name for name in identity if known.get(name) != identity[name])
    details = ", ".join(f"{name} was {known.get(name)!r}" for name in changed if name != "input_sha256")
    what = "other input" if "input_sha256" in changed else "other options"
    return f"was packed from {what}" + (f" ({details})" if details else "")


def _deal(plan: Plan, out: Path, media_root: Path, shard_size: int, options: MediaOptions) -> list[ShardTask]:
    return [
        ShardTask(
            path=out / f"shard-{number:05d}.tar",
            report=out / _STATE / f"shard-{number:05d}.bad.json",
            samples=plan.samples[start : start + shard_size],
            media_root=media_root,
            options=options,
        )
        for number, start in enumerate(range(0, len(plan.samples), shard_size))
    ]


def _sort_out(tasks: list[ShardTask]) -> tuple[list[ShardTask], list[ShardTask]]:
    """Return the shards that are whole and free of bad records, and those to write (again)."""
    kept: list[ShardTask] = []
    todo: list[ShardTask] = []
    for task in tasks:
        index = None if task.report.exists() else _whole_index(task.path)
        (todo if index is None else kept).append(task)
    return kept, todo


def _whole_index(path: Path) -> ShardIndex | None:
    try:
        index = load_index(path)
        return index if path.stat().st_size == index.tar_bytes else None
    except (OSError, ShardError):
        return None


def _complete_index(task: ShardTask, *, num_bad: int) -> list[ShardIndex]:
    """The index of a shard that was written, which accounts for each of its records; none if all of them are bad."""
    index = _whole_index(task.path)
    num_samples = 0 if index is None else index.num_samples
    if num_samples + num_bad != len(task.samples):
        raise ShardError(
            f"{task.path}: holds {num_samples} of {len(task.samples)} samples, and {num_bad} are known as bad: it was "
            "changed while this command was running; run it again, with nothing else writing there"
        )
    return [] if index is None else [index]


def _finish(
    out: Path, plan: Plan, tasks: list[ShardTask], options: MediaOptions, *, num_kept: int, started: float
) -> PackResult:
    bad = list(plan.bad)
    indexes: list[ShardIndex] = []
    for task in tasks:
        bad_here = read_bad(task.report)
        bad.extend(bad_here)
        indexes.extend(_complete_index(task, num_bad=len(bad_here)))
    bad.sort(key=lambda item: item.record)
    lines = "".join(json.dumps(asdict(item), ensure_ascii=True) + "\n" for item in bad)
    write_atomic(out / REPORT, lines.encode())
    info = DatasetInfo.of(indexes, prepared=options.prepared())
    if not info.names:
        first = f" (the first: record {bad[0].record}: {bad[0].reason})" if bad else ""
        raise ShardError(f"{out}: nothing to pack, {len(bad)} records are bad{first}; all are listed in {out / REPORT}")
    info.save(out)
    return PackResult(
        num_samples=sum(info.num_samples),
        num_shards=len(info.names),
        num_kept=num_kept,
        num_bytes=sum(info.num_bytes),
        bad=tuple(bad),
        report=out / REPORT,
        seconds=time.perf_counter() - started,
    )
