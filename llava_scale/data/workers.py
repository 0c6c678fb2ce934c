"""Who builds the rows: the training process itself, threads, or processes. All give the same rows in plan order."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from llava_scale.data.collate import BuiltRow, RowBuilder
from llava_scale.data.planner import RowPlan
from llava_scale.errors import LlavaScaleError

T = TypeVar("T")

_DEATH_SEEN_S = 2.0  # the pipes of a killed process may break before the process is known to be gone
_MAX_NAMED = 8  # samples named in the message of a crash


class Workers(Protocol):
    """Builds rows ahead of their use."""

    def run(self, plans: Iterator[RowPlan]) -> Generator[BuiltRow, None, None]:
        """Yield the row of each plan, in order. Closing the iterator drops what was prepared ahead."""
        ...

    def close(self) -> None:
        """Stop everything; twice does no harm."""
        ...


def make_workers(
    builder: RowBuilder,
    *,
    num_workers: int,
    worker_type: Literal["thread", "process"],
    prefetch_rows: int,
    pin_memory: bool = False,
) -> Workers:
    """Return ``num_workers`` workers that each prepare up to ``prefetch_rows`` rows ahead; 0 builds rows on demand."""
    if num_workers == 0:
        return InlineWorkers(builder, pin_memory=pin_memory)
    if worker_type == "thread":
        return ThreadWorkers(builder, num_workers, num_workers * prefetch_rows, pin_memory=pin_memory)
    return ProcessWorkers(builder, num_workers, prefetch_rows, pin_memory=pin_memory)


class InlineWorkers:
    """Rows are built when they are asked for."""

    def __init__(self, builder: RowBuilder, *, pin_memory: bool = False) -> None:
        self._builder = builder
        self._pin = pin_memory

    def run(self, plans: Iterator[RowPlan]) -> Generator[BuiltRow, None, None]:
        """Yield the row of each plan, in order."""
        for plan in plans:
            yield _result(_build(self._builder, plan, self._pin))

    def close(self) -> None:
        """Nothing to stop."""


class ThreadWorkers:
    """Threads of this process; planning runs in one more.

    Decoders and tokenizers release the interpreter lock, so threads use all cores; they start at once and hand rows
    over without copies.
    """

    def __init__(self, builder: RowBuilder, num_workers: int, num_ahead: int, *, pin_memory: bool = False) -> None:
        self._builder = builder
        self._pin = pin_memory
        self._num_ahead = num_ahead
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="llava-scale-loader")
        self._finalizer = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        _use_one_core_each(self._pool, num_workers)

    def run(self, plans: Iterator[RowPlan]) -> Generator[BuiltRow, None, None]:
        """Yield the row of each plan, in order."""
        ahead = Ahead(_submitted(plans, self._pool, self._builder, self._pin), self._num_ahead)
        try:
            for future in ahead:
                yield _result(future.result())
        finally:
            for future in ahead.close():
                future.cancel()

    def close(self) -> None:
        """Stop the threads after the rows that they are building."""
        self._finalizer.detach()
        self._pool.shutdown(wait=True, cancel_futures=True)


class ProcessWorkers:
    """Processes started by torch's ``DataLoader``; rows come back through shared memory.

    The processes start from a clean server process (or anew where the system has none), never as a copy of the
    training process with its threads and device.
    """

    def __init__(self, builder: RowBuilder, num_workers: int, prefetch_rows: int, *, pin_memory: bool = False) -> None:
        self._plans = _PlanFeed()
        self._num_workers = num_workers
        self._loader: DataLoader[BuiltRow | Failure] = DataLoader(
            _Rows(builder),
            batch_size=None,
            sampler=self._plans,
            num_workers=num_workers,
            prefetch_factor=prefetch_rows,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            persistent_workers=True,
            multiprocessing_context=_safe_context(builder),
            worker_init_fn=_start_process,
        )

    def run(self, plans: Iterator[RowPlan]) -> Generator[BuiltRow, None, None]:
        """Yield the row of each plan, in order."""
        ahead = Ahead(plans, self._num_workers)
        self._plans.source = ahead
        in_flight = self._plans.in_flight
        in_flight.clear()
        try:
            results = iter(self._loader)
            while True:
                try:
                    result = next(results)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    if self._lost_a_worker():
                        raise _died(error, in_flight) from error
                    raise
                in_flight.popleft()
                yield _result(result)
        finally:
            ahead.close()

    def close(self) -> None:
        """Stop the processes and wait for them."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None

    def _lost_a_worker(self) -> bool:
        """Whether a process is gone; what its death raises here depends on what it was handing over."""
        processes = getattr(getattr(self._loader, "_iterator", None), "_workers", ())
        return bool(wait([process.sentinel for process in processes], timeout=_DEATH_SEEN_S))


class Ahead(Generic[T]):
    """Runs an iterator in a thread of its own, at most ``depth`` items ahead of the reader.

    What the iterator raises is raised to the reader, in its place.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._flow: _Flow[T] = _Flow(depth)
        self._thread = threading.Thread(target=self._flow.fill, args=(items,), name="llava-scale-planner", daemon=True)
        self._stop = weakref.finalize(self, self._flow.stop)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self._flow.take()

    def close(self) -> list[T]:
        """Stop the thread, wait for it, and return the items that nobody took."""
        self._stop.detach()
        self._flow.stop()
        self._thread.join()
        return list(self._flow.items)


class _Flow(Generic[T]):
    """What the thread of ``Ahead`` and its reader share; does not refer to the reader, so that it can be collected."""

    def __init__(self, depth: int) -> None:
        self.items: deque[T] = deque()
        self._depth = depth
        self._changed = threading.Condition()
        self._stopped = False
        self._end: BaseException | None = None

    def fill(self, source: Iterator[T]) -> None:
        end: BaseException = StopIteration()
        try:
            for item in source:
                with self._changed:
                    self.items.append(item)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._stopped or len(self.items) < self._depth)
                    if self._stopped:
                        break
        except BaseException as error:  # handed to the reader
            end = error
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def take(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self.items or self._end is not None)
            if self.items:
                item = self.items.popleft()
                self._changed.notify_all()
                return item
            assert self._end is not None
            raise self._end

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception of a worker on its way to the training process.

    Attributes:
        error: The exception if it is one of ours; others may not survive the way.
        where: Row and samples that were being built.
        trace: The worker's traceback.
    """

    error: LlavaScaleError | None
    where: str
    trace: str

    def exception(self) -> Exception:
        """The exception to raise, with the worker's traceback in its message or as its cause."""
        if self.error is not None:
            self.error.__cause__ = RemoteTracebackError(self.trace)
            return self.error
        return RuntimeError(f"a loader worker failed while building {self.where}\n\n{self.trace}")


class RemoteTracebackError(Exception):
    """Carries the traceback of a worker as the cause of the error raised in the training process."""

    def __str__(self) -> str:
        return f"in the worker:\n{self.args[0]}"


class _Rows(Dataset[BuiltRow | Failure]):
    """The rows by plan, as the map-style data set that ``DataLoader`` asks for."""

    def __init__(self, builder: RowBuilder) -> None:
        self._builder = builder

    def __getitem__(self, plan: RowPlan) -> BuiltRow | Failure:
        return _build(self._builder, plan, pin=False)


class _PlanFeed(Sampler[RowPlan]):
    """Hands plans to ``DataLoader`` and remembers those whose rows have not come back."""

    def __init__(self) -> None:
        self.source: Iterable[RowPlan] = ()
        self.in_flight: deque[RowPlan] = deque()

    def __iter__(self) -> Iterator[RowPlan]:
        for plan in self.source:
            self.in_flight.append(plan)
            yield plan


def _submitted(
    plans: Iterator[RowPlan], pool: ThreadPoolExecutor, builder: RowBuilder, pin: bool
) -> Iterator[Future[BuiltRow | Failure]]:
    for plan in plans:
        builder.prefetch(plan)
        yield pool.submit(_build, builder, plan, pin)


def _build(builder: RowBuilder, plan: RowPlan, pin: bool) -> BuiltRow | Failure:
    try:
        built = builder.build(plan)
        return built.pin_memory() if pin else built
    except Exception as error:
        known = error if isinstance(error, LlavaScaleError) else None
        return Failure(known, _describe(builder, plan), traceback.format_exc())


def _result(result: BuiltRow | Failure) -> BuiltRow:
    if isinstance(result, Failure):
        raise result.exception()
    return result


def _describe(builder: RowBuilder, plan: RowPlan) -> str:
    """Row and samples of a plan in words; must not raise, since it describes another failure."""
    names = []
    for planned in plan.samples[:_MAX_NAMED]:
        dataset = builder.datasets[planned.source]
        try:
            names.append(f"{dataset.shard_name(dataset.locate(planned.number)[0])}/{dataset.key(planned.number)}")
        except Exception:  # an unreadable index may be what failed
            names.append(f"{dataset.name}[{planned.number}]")
    more = len(plan.samples) - len(names)
    return f"row {plan.row} (samples {', '.join(names)}{f' and {more} more' if more > 0 else ''})"


def _died(error: Exception, in_flight: deque[RowPlan]) -> RuntimeError:
    rows = ", ".join(str(plan.row) for plan in list(in_flight)[:_MAX_NAMED])
    return RuntimeError(
        f"{error}\na loader worker process died while rows {rows} were being built; if it was killed for memory, lower "
        "data.num_workers or data.prefetch_rows"
    )


def _safe_context(builder: RowBuilder) -> multiprocessing.context.BaseContext:
    """A way to start processes that never copies a process with threads.

    The server imports what the builder needs before it forks, so workers start at once and share those pages.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    finder = _ModuleFinder(io.BytesIO())
    finder.dump(builder)
    context.set_forkserver_preload([__name__, *sorted(finder.modules - {"__main__"})])
    return context


class _ModuleFinder(pickle.Pickler):
    """Collects the modules that unpickling an object will import."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.modules: set[str] = set()

    def reducer_override(self, obj: object) -> Any:
        self.modules.add(getattr(obj if isinstance(obj, type) else type(obj), "__module__", __name__))
        return NotImplemented


def _start_process(worker: int) -> None:
    torch.set_num_threads(1)


def _use_one_core_each(pool: ThreadPoolExecutor, num_workers: int) -> None:
    """Let each thread of the pool compute on its own core only, and leave the calling thread as it was.

    ``torch.set_num_threads`` acts on its thread and on threads whose number is not settled yet.
    """
    num_threads = torch.get_num_threads()
    together = threading.Barrier(num_workers)

    def limit() -> None:
        together.wait()
        torch.set_num_threads(1)
        torch.get_num_threads()  # the first call of a thread settles its number

    started: list[Future[None]] = [pool.submit(limit) for _ in range(num_workers)]
    for future in started:
        future.result()
    torch.set_num_threads(num_threads)


def _unchanged(item: T) -> T:
    return item
