"""Held-out loss during training."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from llava_scale.model import row_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
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
) -> dict[str, Any] | None:
    """Mean loss (nats a supervised token) over the first ``max_rows`` held-out rows, as a line of the log.

    The mean is over all tokens together, whatever the rows they came in. None if ``stop`` came in between.
    The model must be in evaluation mode.
    """
    start = time.perf_counter()
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_tokens = num_samples = 0
    for row in islice((row for batch in batches for row in batch.rows), max_rows):
        if stop:
            return None
        if row.num_supervised:
            with autocast():
                inputs = row_inputs(row, device=device)
                total += model(**inputs, num_items_in_batch=1, loss_chunk=loss_chunk).loss.double()
        num_tokens += row.num_supervised
        num_samples += len(row.keys)
    return {
        "eval/loss": float(total) / num_tokens if num_tokens else None,
        "eval/tokens": num_tokens,
        "eval/samples": num_samples,
        "eval/seconds": round(time.perf_counter() - start, 3),
    }
