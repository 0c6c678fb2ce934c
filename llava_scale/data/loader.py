"""The stream of batches: endless in training, once through in evaluation, resumable at any step on any number of ranks.

Planner (which samples make which row) -> workers (build rows ahead) -> ``StepBatch`` of this rank's rows.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llava_scale.data.budget import ErrorBudget
from llava_scale.data.collate import MediaTransform, RowBuilder
from llava_scale.data.dataset import open_dataset
from llava_scale.data.planner import Planner, PlanState, RowPlan, StepPlan
from llava_scale.data.state import decode_state, encode_state
from llava_scale.data.stream_plan import Split, StreamPlan
from llava_scale.data.workers import make_workers
from llava_scale.errors import ConfigError
from llava_scale.types import MediaKind, StepBatch

if TYPE_CHECKING:
    from llava_scale.config.data import DataConfig
    from llava_scale.data.chat import ChatEncoder
    from llava_scale.data.collate import BuiltRow
    from llava_scale.data.dataset import ShardedDataset
    from llava_scale.data.features import FeatureFolder
    from llava_scale.data.workers import Workers
    from llava_scale.types import MediaTokenCounter


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCounters:
    """How much of one data set was used.

    Attributes:
        samples: Samples given out in batches, over all ranks, from the start of training.
        epochs: Passes over the data set.
        skipped: Unusable samples that this rank met in this run.
        truncated: Samples whose text this rank cut in this run.
    """

    samples: int
    epochs: float
    skipped: int
    truncated: int


def open_stream(
    config: DataConfig,
    *,
    seed: int,
    rows_per_step: int,
    encoder: ChatEncoder,
    counter: MediaTokenCounter,
    image_transform: MediaTransform,
    transforms: Mapping[MediaKind, MediaTransform] | None = None,
    rank: int = 0,
    world_size: int = 1,
    split: Split = "train",
    skipped_log: Path | None = None,
    pin_memory: bool = False,
    features: FeatureFolder | None = None,
) -> StreamingLoader:
    """Open the data sets of ``config`` and return their stream.

    Args:
        config: Data sets, order, packing and workers.
        seed: Chooses the order; evaluation has one order of its own.
        rows_per_step: Rows of one step over all ranks; ``world_size`` must divide it.
        encoder: Conversation -> token ids.
        counter: Tokens of each medium at each step.
        image_transform: Encoded picture -> uint8 ``(3, H, W)``.
        transforms: The same for other kinds of media; samples with a kind that has none cannot be used.
        rank: Which slice of each step's rows to give out.
        world_size: Number of slices.
        split: ``train`` never ends; ``eval`` uses each sample of ``eval_sources``, or of the held-out part of
            ``sources``, once.
        skipped_log: JSON lines file that lists unusable samples.
        pin_memory: Rows in page-locked memory, for training on a CUDA device.
        features: Tower features computed ahead, read instead of decoding media of the kinds that it holds.

    Raises:
        ConfigError: no data sets, ranks that do not divide the rows, or shards without features.
        ShardError: a data set cannot be opened.
    """
    sources = config.sources if split == "train" or config.holdout else config.eval_sources
    if not sources:
        field = "sources" if split == "train" else "eval_sources (or data.holdout)"
        raise ConfigError(f"there is nothing to stream: set data.{field}")
    datasets = [
        open_dataset(source.path, name=source.name, cache_dir=config.cache_dir, cache_size_gb=config.cache_size_gb)
        for source in sources
    ]
    return StreamingLoader(
        datasets,
        replace(config, sources=sources),
        seed=seed,
        rows_per_step=rows_per_step,
        encoder=encoder,
        counter=counter,
        transforms={**(transforms or {}), "image": image_transform},
        rank=rank,
        world_size=world_size,
        split=split,
        skipped_log=skipped_log,
        pin_memory=pin_memory,
        features=features,
    )


class StreamingLoader:
    """Gives out the batches of one rank.

    The rows of a step depend on the data, the config and the seed, never on ranks or workers. Iterating continues
    behind the last batch that was given out, so it can be broken off and taken up again; an evaluation stream starts
    from the beginning each time. One iteration runs at a time: starting another ends the first.

    Args:
        datasets: One per entry of ``config.sources``, whose weights are used.
        config: Order, packing, workers, budget.
        transforms: Per kind of media the way from encoded bytes to a tensor.

    The other arguments are those of ``open_stream``.

    Attributes:
        plan: Which samples make which row.
    """

    def __init__(
        self,
        datasets: Sequence[ShardedDataset],
        config: DataConfig,
        *,
        seed: int,
        rows_per_step: int,
        encoder: ChatEncoder,
        counter: MediaTokenCounter,
        transforms: Mapping[MediaKind, MediaTransform],
        rank: int = 0,
        world_size: int = 1,
        split: Split = "train",
        skipped_log: Path | None = None,
        pin_memory: bool = False,
        features: FeatureFolder | None = None,
    ) -> None:
        if rows_per_step % world_size:
            raise ConfigError(
                f"train.rows_per_step={rows_per_step} cannot be divided among {world_size} ranks; "
                f"make it a multiple of {world_size}"
            )
        _check_names(datasets)
        if features is not None:
            features.check_covers(datasets)
        self._datasets = list(datasets)
        self._config = config
        self._rank = rank
        self._rows_per_rank = rows_per_step // world_size
        self._pin_memory = pin_memory
        self.plan = StreamPlan(
            datasets=self._datasets,
            config=config,
            split=split,
            run_seed=seed,
            rows_per_step=rows_per_step,
            encoder=encoder,
            counter=counter,
            kinds=frozenset(transforms),
        )
        self._builder = RowBuilder(
            datasets=self._datasets,
            encoder=encoder,
            counter=counter,
            transforms=dict(transforms),
            row_length=config.packing.row_length,
            truncate=config.truncate == "text",
            features=features,
        )
        self._budget = ErrorBudget(config.max_bad_fraction, config.max_bad_in_a_row, skipped_log)
        self._skipped = [0] * len(self._datasets)
        self._truncated = [0] * len(self._datasets)
        self._workers: Workers | None = None
        self._state = PlanState.start(len(self._datasets))
        self._consumed: StepPlan | None = None  # the state is derived from it when somebody asks
        self._was_loaded = False
        self._running: weakref.ref[Generator[StepBatch, None, None]] | None = None

    def __enter__(self) -> StreamingLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[StepBatch]:
        self._end_iteration()
        if self.plan.split == "eval" and not self._was_loaded:
            self._set_state(PlanState.start(len(self._datasets)))
        self._was_loaded = False
        batches = self._batches()
        self._running = weakref.ref(batches)
        return batches

    def close(self) -> None:
        """End the iteration and stop the workers; iterating again starts new ones."""
        self._end_iteration()
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands behind the last batch given out: small, JSON-able, the same on every rank.

        Rows prepared ahead do not count.
        """
        return encode_state(self._current_state(), self.plan.fingerprint)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind the batch after which ``state`` was taken, at this or another number of ranks and workers.

        Raises:
            CheckpointError: the state is damaged, or belongs to other data, settings or token counts.
        """
        loaded = decode_state(state, self.plan.fingerprint)
        self._end_iteration()
        self._set_state(loaded)
        self._was_loaded = True

    @property
    def num_samples(self) -> int:
        """Samples of one epoch: all data sets, this side of the held-out split.

        With ``holdout`` and more than a thousand shards in a data set it is extrapolated from some of them.
        """
        return self.plan.num_samples

    @property
    def counters(self) -> dict[str, SourceCounters]:
        """What was used of each data set, by its name."""
        state = self._current_state()
        columns = (self._datasets, state.num_used(), state.positions, self._skipped, self._truncated)
        return {
            dataset.name: SourceCounters(
                samples=samples, epochs=position / len(dataset), skipped=skipped, truncated=truncated
            )
            for dataset, samples, position, skipped, truncated in zip(*columns, strict=True)
        }

    def steps_per_epoch(self) -> int:
        """Steps in which as many samples are used as the data sets hold together.

        Exact (planned on lengths) up to 20,000 samples and where rows have a fixed number of samples; beyond that
        estimated from the lengths of a spread of samples.
        """
        return self.plan.steps_per_epoch()

    def _batches(self) -> Generator[StepBatch, None, None]:
        planner = self.plan.planner(self._current_state())
        finished: deque[StepPlan] = deque()
        rows = self._open_workers().run(_rows_of_rank(planner, finished, self._rank, self._rows_per_rank))
        try:
            while built := list(islice(rows, self._rows_per_rank)):
                plan = finished.popleft()
                for row in built:
                    self._count(row, plan.step)
                self._consumed = plan
                yield StepBatch(step=plan.step, rows=tuple(row.row for row in built))
        finally:
            rows.close()

    def _count(self, built: BuiltRow, step: int) -> None:
        for outcome in built.outcomes:
            self._skipped[outcome.source] += outcome.skipped is not None
            self._truncated[outcome.source] += outcome.truncated
        self._budget.count(built.outcomes, step)

    def _open_workers(self) -> Workers:
        if self._workers is None:
            self._workers = make_workers(
                self._builder,
                num_workers=self._config.num_workers,
                worker_type=self._config.worker_type,
                prefetch_rows=self._config.prefetch_rows,
                pin_memory=self._pin_memory,
            )
        return self._workers

    def _end_iteration(self) -> None:
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()
        self._running = None

    def _current_state(self) -> PlanState:
        if self._consumed is not None:
            self._set_state(self._consumed.state())
        return self._state

    def _set_state(self, state: PlanState) -> None:
        self._state = state
        self._consumed = None


def _check_names(datasets: Sequence[ShardedDataset]) -> None:
    paths: dict[str, str] = {}
    for number, dataset in enumerate(datasets):
        other = paths.setdefault(dataset.name, dataset.path)
        if number >= len(paths):
            raise ConfigError(
                f"two data sets are named {dataset.name!r} ({other} and {dataset.path}); set data.sources.{number}.name"
            )


def _rows_of_rank(
    planner: Planner, finished: deque[StepPlan], rank: int, rows_per_rank: int
) -> Generator[RowPlan, None, None]:
    """Yield the plans of one rank's rows, and leave each step's plan in ``finished`` before its first row."""
    for plan in planner.steps():
        finished.append(plan)
        yield from plan.rows[rank * rows_per_rank : (rank + 1) * rows_per_rank]
