"""Steps whose loss or gradient is not finite: left out, counted, and fatal in a row.

Whether a step is finite is known on the device long before the processor hears of it. The optimizer is told on the
device, and the answer is read one step later, so that the loop never waits for the step in hand.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llava_scale.errors import TrainingError
from llava_scale.training.parallel import Ranks

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadStep:
    """An optimizer step that was left out.

    Attributes:
        step: Its number, counted like the log's: steps finished after it.
        keys: Keys of its samples, of all ranks.
    """

    step: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class _Pending:
    step: int
    keys: tuple[str, ...]
    finite: Tensor
    copied: torch.cuda.Event | None


class FiniteGuard:
    """Counts non-finite steps.

    Args:
        max_in_a_row: Bad steps in a row that end the run.
        ranks: All processes of the run, which see the same outcomes.

    Attributes:
        num_bad: Bad steps so far.
        num_in_a_row: Bad steps directly before the next one.
    """

    def __init__(self, max_in_a_row: int, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self.max_in_a_row = max_in_a_row
        self.num_bad = 0
        self.num_in_a_row = 0
        self._pending: deque[_Pending] = deque()

    def watch(self, step: int, keys: tuple[str, ...], finite: Tensor) -> None:
        """Take in the outcome of ``step``: a boolean scalar on the training device."""
        copied = None
        if finite.device.type == "cuda":
            finite = finite.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._pending.append(_Pending(step, keys, finite, copied))

    def settle(self, *, keep: int) -> list[BadStep]:
        """Judge every step taken in but the newest ``keep``; return the bad ones.

        Raises:
            TrainingError: ``max_in_a_row`` steps in a row were bad.
        """
        bad = []
        while len(self._pending) > keep:
            item = self._pending.popleft()
            if item.copied is not None:
                item.copied.synchronize()
            if bool(item.finite):
                self.num_in_a_row = 0
                continue
            self.num_bad += 1
            self.num_in_a_row += 1
            keys = tuple(key for part in self._ranks.gather(item.keys) for key in part)
            bad.append(BadStep(item.step, keys))
            shown = ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
            logger.warning("step %d: loss or gradient is not finite; step left out. Samples: %s", item.step, shown)
            if self.num_in_a_row >= self.max_in_a_row:
                raise TrainingError(
                    f"loss or gradient was not finite in {self.num_in_a_row} steps in a row (up to step {item.step}); "
                    f"lower train.learning_rate, or look at the samples of the last one: {shown}"
                )
        return bad

    def state_dict(self) -> dict[str, int]:
        """Counts as plain values; every step must have been settled."""
        assert not self._pending, "settle(keep=0) comes first"
        return {"num_bad": self.num_bad, "num_in_a_row": self.num_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from ``state_dict``'s counts."""
        self.num_bad, self.num_in_a_row = state["num_bad"], state["num_in_a_row"]
