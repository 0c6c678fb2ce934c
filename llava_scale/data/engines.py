"""Run independent tasks: here, in a pool of processes, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from llava_scale.data.files import locked
from llava_scale.errors import ConfigError, MissingExtraError, ShardError, suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

Engine = Literal["pool", "ray"]
_ENGINES = ("pool", "ray")

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    engine: Engine = "pool",
    workers: int = 1,
    workers_lock: Path | None = None,
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, result) as tasks finish. The first exception of a task stops the rest and is raised.

    Args:
        function: Module-level function.
        tasks: Picklable arguments; few are under way at a time, so that their size does not add up.
        engine: ``pool`` or ``ray``.
        workers: Tasks at a time. ``pool`` with 1 runs them in this process; ``ray`` with 0 takes all of the cluster.
        workers_lock: Lock file that each process of ``pool`` shares while it lives. Whoever holds it alone knows that
            none is left, also of a run that was killed.

    Raises:
        ShardError: if a worker process died.
        MissingExtraError: if Ray is not installed.
    """
    if engine not in _ENGINES:
        raise ConfigError(f"unknown engine {engine!r}; {suggest(engine, _ENGINES)}")
    if engine == "ray":
        return _run_ray(function, tasks, workers)
    if min(workers, len(tasks)) <= 1:
        return ((task, function(task)) for task in tasks)
    return _run_pool(function, tasks, workers, workers_lock)


def _run_pool(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, lock: Path | None
) -> Iterator[tuple[Task, Result]]:
    # Spawned, not forked: a fork would copy locks of threads that are running here.
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(os.getpid(), lock),
    )
    remaining = iter(tasks)
    running: dict[Future[Result], Task] = {}
    try:
        for task in remaining:
            running[pool.submit(function, task)] = task
            if len(running) >= 2 * workers:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    except BrokenProcessPool:
        raise ShardError("a worker process died (out of memory?); run the command again to continue") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(running: dict[Future[Result], Task]) -> Iterator[tuple[Task, Result]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


_held = contextlib.ExitStack()
"""What a worker process holds until it ends."""


def _start_worker(parent: int, lock: Path | None) -> None:
    """Take the shared lock; end when the process that started this one is gone, killed without a chance to say so."""
    if lock is not None:
        _held.enter_context(locked(lock, shared=True))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    if os.getppid() != parent:  # gone before the lock was taken: its successor may be at work
        os._exit(1)
    threading.Thread(target=watch, daemon=True, name="leave-with-parent").start()


def _run_ray(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Result]]:
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    remote = ray.remote(max_retries=3)(function)
    num_cpus = ray.cluster_resources().get("CPU", 1)
    limit = workers or max(2, 2 * int(num_cpus))
    running: dict[Any, Task] = {}
    try:
        for task in tasks:
            running[remote.remote(task)] = task
            if len(running) >= limit:
                yield from _finished_ray(ray, running)
        while running:
            yield from _finished_ray(ray, running)
    finally:
        for reference in running:
            ray.cancel(reference)
        if started:
            ray.shutdown()


def _finished_ray(ray: Any, running: dict[Any, Task]) -> Iterator[tuple[Task, Any]]:
    done, _ = ray.wait(list(running), num_returns=1)
    for reference in done:
        try:
            result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        yield running.pop(reference), result
