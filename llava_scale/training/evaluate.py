"""Held-out loss during training."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from llava_scale.model import row_inputs
from llava_scale.training.parallel import Ranks
from llava_scale.types import IGNORE_INDEX, PackedRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from torch import nn

    from llava_scale.training.interrupt import StopRequest
    from llava_scale.types import StepBatch


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: Iterable[StepBatch],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    max_rows: int,
    loss_chunk: int,
    stop: StopRequest,
    ranks: Ranks | None = None,
) -> dict[str, Any] | None:
    """Mean loss (nats a supervised token) over the first ``max_rows`` held-out rows, as a line of the log.

    The mean is over all tokens together, whatever the rows they came in. None if ``stop`` came in between.
    The model must be in evaluation mode. Several ranks take one row of each batch, in step with each other.
    """
    ranks = ranks or Ranks()
    start = time.perf_counter()
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_tokens = num_samples = 0
    for row in _rows_in_step(batches, max_rows, ranks):
        if ranks.any(bool(stop)):
            return None
        if row.num_supervised or ranks.size > 1:
            with autocast():
                inputs = row_inputs(row, device=device)
                total += model(**inputs, num_items_in_batch=1, loss_chunk=loss_chunk).loss.double()
        num_tokens += row.num_supervised
        num_samples += len(row.keys)
    num_tokens, num_samples = ranks.total(num_tokens), ranks.total(num_samples)
    return {
        "eval/loss": float(ranks.sum_(total)) / num_tokens if num_tokens else None,
        "eval/tokens": num_tokens,
        "eval/samples": num_samples,
        "eval/seconds": round(time.perf_counter() - start, 3),
    }


def _rows_in_step(batches: Iterable[StepBatch], max_rows: int, ranks: Ranks) -> Iterator[PackedRow]:
    """This rank's rows among the first ``max_rows`` of all ranks; blank ones while only others have any left."""
    rows = (row for batch in batches for row in batch.rows)
    for number in range(ranks.rank, ranks.rank + max_rows + ranks.size, ranks.size):
        row = next(rows, None) if number < max_rows else None
        if not ranks.any(row is not None):
            return
        yield row if row is not None else _blank_row()


def _blank_row() -> PackedRow:
    """A row that changes no sum."""
    return PackedRow(
        input_ids=torch.zeros(2, dtype=torch.int64),
        labels=torch.full((2,), IGNORE_INDEX),
        position_ids=torch.arange(2),
        cu_seq_lens=torch.tensor([0, 2], dtype=torch.int32),
    )
