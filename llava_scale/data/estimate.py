"""How large an epoch is, without going through it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llava_scale.data.lengths import UNREADABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava_scale.data.cursor import Cursor
    from llava_scale.data.planner import PlanRules
    from llava_scale.types import MediaInfo

_COUNTED_SHARDS = 1_000
_SAMPLED_SHARDS = 64
_SPREAD_BLOCKS = 32
_SPREAD_SAMPLES = 2_048
_FILL = 0.995  # of a row, as measured on caption and instruction mixes
_STEPS_LOOKED_AT = 64


def count_samples(cursor: Cursor) -> int:
    """Samples of the cursor's part of its data set.

    Extrapolated from some shards where the keys of more than a thousand would have to be read.
    """
    dataset = cursor.dataset
    if not cursor.is_split:
        return len(dataset)
    num_shards = dataset.num_shards
    shards = range(num_shards)
    if num_shards > _COUNTED_SHARDS:
        shards = range(0, num_shards, num_shards // _SAMPLED_SHARDS)
    looked_at = sum(len(dataset.shard_range(shard)) for shard in shards)
    wanted = sum(int(cursor.wanted_in_shard(shard).sum()) for shard in shards)
    return wanted if len(shards) == num_shards else round(len(dataset) * wanted / looked_at)


def estimate_steps(
    cursors: Sequence[Cursor], weights: Sequence[float] | None, rules: PlanRules, *, num_samples: int
) -> int:
    """Steps that ``num_samples`` draws take, from the mean length of a spread of samples.

    Token counts may change with the step, so the mean is taken over steps of the epoch.
    """
    shares = weights or [float(len(cursor.dataset)) for cursor in cursors]
    spreads = [_spread(cursor, rules) for cursor in cursors]
    row_length = rules.row_length or 1
    steps = 1
    for _ in range(3):
        looked_at = np.unique(np.linspace(0, steps, _STEPS_LOOKED_AT).astype(int)).tolist()
        means = [_mean_length(spreads, shares, rules, None if weights is None else step) for step in looked_at]
        tokens = num_samples * sum(means) / len(means)
        steps = max(1, math.ceil(tokens / (row_length * _FILL) / rules.rows_per_step))
    return steps


@dataclass(frozen=True, slots=True)
class _Spread:
    """Usable samples spread over a data set."""

    num_samples: int
    text_tokens: int
    media: Counter[MediaInfo]


def _spread(cursor: Cursor, rules: PlanRules) -> _Spread:
    """Look at samples in blocks spread evenly over the data set."""
    size = len(cursor.dataset)
    num_blocks = min(_SPREAD_BLOCKS, size)
    block = max(1, min(size, _SPREAD_SAMPLES) // num_blocks)
    starts = np.linspace(0, size - block, num_blocks).astype(np.int64)
    numbers = np.unique((starts[:, None] + np.arange(block)).reshape(-1))
    usable = [
        draw
        for draw in cursor.draws_of(numbers)
        if draw.text_length != UNREADABLE and all(info.kind in rules.kinds for info in draw.media)
    ]
    media = Counter(info for draw in usable for info in draw.media)
    return _Spread(len(usable), sum(draw.text_length for draw in usable), media)


def _mean_length(spreads: Sequence[_Spread], shares: Sequence[float], rules: PlanRules, step: int | None) -> float:
    means = []
    for spread in spreads:
        media_tokens = sum(count * rules.count(info, step) for info, count in spread.media.items())
        means.append((spread.text_tokens + media_tokens) / max(1, spread.num_samples))
    return sum(mean * share for mean, share in zip(means, shares, strict=True)) / sum(shares)
