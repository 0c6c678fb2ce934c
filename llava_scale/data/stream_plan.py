"""Everything that the sequence of rows depends on, in one place: makes planners, sizes epochs, names itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from llava_scale.data.cursor import Cursor
from llava_scale.data.estimate import count_samples, estimate_steps
from llava_scale.data.lengths import TextLengths
from llava_scale.data.order import Order, mix
from llava_scale.data.packing import CountPool, TokenPool
from llava_scale.data.planner import Planner, PlanRules, PlanState
from llava_scale.types import MediaInfo

if TYPE_CHECKING:
    from llava_scale.config.data import DataConfig
    from llava_scale.data.chat import ChatEncoder
    from llava_scale.data.dataset import ShardedDataset
    from llava_scale.types import MediaTokenCounter

Split = Literal["train", "eval"]

_PLANNED_EXACTLY = 20_000
"""Samples up to which ``steps_per_epoch`` plans a whole epoch."""
_EVAL_SEED = 0


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What decides which samples make which row.

    Attributes:
        datasets: One per entry of ``config.sources``, whose weights are used.
        config: Order and packing.
        split: ``train`` never ends; ``eval`` uses each sample once, in an order of its own.
        run_seed: Chooses the order of training.
        rows_per_step: Rows of one step over all ranks.
        encoder: Conversation -> token ids.
        counter: Tokens of each medium at each step.
        kinds: Kinds of media that can be used.
    """

    datasets: Sequence[ShardedDataset]
    config: DataConfig
    split: Split
    run_seed: int
    rows_per_step: int
    encoder: ChatEncoder
    counter: MediaTokenCounter
    kinds: frozenset[str]

    @property
    def seed(self) -> int:
        """Seed of the order; evaluation has the same in every run."""
        return self.run_seed if self.split == "train" else _EVAL_SEED

    @property
    def weights(self) -> list[float] | None:
        """Weights of the data sets; None where each sample is used once."""
        return [source.weight for source in self.config.sources] if self.split == "train" else None

    @property
    def num_samples(self) -> int:
        """Samples of one epoch: all data sets, this side of the held-out split."""
        return sum(count_samples(cursor) for cursor in self.cursors())

    def steps_per_epoch(self) -> int:
        """Steps in which as many samples are used as the data sets hold together; see ``StreamingLoader``."""
        packing = self.config.packing
        if packing.mode == "samples":
            rows = -(-self.num_samples // packing.samples_per_row)
            return -(-rows // self.rows_per_step)
        size = sum(len(dataset) for dataset in self.datasets)
        if size > _PLANNED_EXACTLY:
            return estimate_steps(self.cursors(), self.weights, self.rules(), num_samples=self.num_samples)
        last = 0
        for plan in self.planner(PlanState.start(len(self.datasets))).steps():
            last = plan.step + 1
            if plan.epoch > 0 or (self.split == "train" and not plan.waiting and sum(plan.positions) >= size):
                break
        return last

    def planner(self, state: PlanState) -> Planner:
        """Plan from ``state`` on."""
        packing = self.config.packing
        pool = (
            TokenPool(packing.row_length, packing.lookahead_rows)
            if packing.mode == "tokens"
            else CountPool(packing.samples_per_row)
        )
        return Planner(self.cursors(), self.weights, pool, self.rules(), state)

    def cursors(self) -> list[Cursor]:
        """One new cursor per data set."""
        config = self.config
        by_tokens = config.packing.mode == "tokens"
        cursors = []
        for source, (dataset, lengths) in enumerate(zip(self.datasets, self._lengths, strict=True)):
            seed = mix(self.seed, source)
            order = Order(len(dataset), seed, config.block_size, config.shuffle_blocks, config.shuffle)
            cursor = Cursor(
                source,
                dataset,
                order,
                lengths if by_tokens else None,
                held_out=config.holdout,
                part=self.split,
                limit=len(dataset) if self.split == "eval" else None,
            )
            cursors.append(cursor)
        return cursors

    def rules(self) -> PlanRules:
        """How samples become rows."""
        config = self.config
        return PlanRules(
            rows_per_step=self.rows_per_step,
            row_length=config.packing.row_length if config.packing.mode == "tokens" else None,
            truncate=config.truncate == "text",
            count=self._count_tokens,
            kinds=self.kinds,
            max_rejected=config.max_bad_in_a_row,
        )

    @cached_property
    def fingerprint(self) -> Mapping[str, Any]:
        """Small values that differ whenever the sequence of rows could, by their names for messages."""
        config, packing = self.config, self.config.packing
        rows: dict[str, Any] = {"samples_per_row": packing.samples_per_row}
        if packing.mode == "tokens":
            rows = {"lookahead_rows": packing.lookahead_rows}
        order: dict[str, Any] = {"shuffle": False}
        if config.shuffle:
            order = {"block_size": config.block_size, "shuffle_blocks": config.shuffle_blocks}
        return {
            "data sets": [_short(dataset.fingerprint()) for dataset in self.datasets],
            "weights": self.weights or [],
            "split": self.split,
            "holdout": config.holdout,
            "seed": self.seed,
            "rows_per_step": self.rows_per_step,
            "row_length": packing.row_length,
            "truncate": config.truncate,
            "encoder": _short(self.encoder.fingerprint()),
            "token counts": _short(self.counter.fingerprint()),
            **rows,
            **order,
        }

    @cached_property
    def _lengths(self) -> list[TextLengths]:
        return [TextLengths(dataset, self.encoder, cache_dir=self.config.cache_dir) for dataset in self.datasets]

    def _count_tokens(self, info: MediaInfo, step: int | None) -> int:
        return self.counter.count(info, step=step).num_positions


def _short(fingerprint: str) -> str:
    return blake2b(fingerprint.encode(), digest_size=8).hexdigest()
