"""How many unusable samples a run tolerates, and the list of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llava_scale.errors import SampleError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llava_scale.data.collate import Outcome

CHECKED_FROM = 1_000
"""Samples after which the share of unusable ones is checked."""


class ErrorBudget:
    """Counts samples and stops the run when too many cannot be used.

    Args:
        max_fraction: Share of unusable samples that stops the run, once ``CHECKED_FROM`` samples were seen.
        max_in_a_row: Unusable samples in a row that stop the run.
        log: JSON lines file that lists each of them; None lists none.
    """

    def __init__(self, max_fraction: float, max_in_a_row: int, log: Path | None = None) -> None:
        self._max_fraction = max_fraction
        self._max_in_a_row = max_in_a_row
        self._log = log
        self._num_seen = 0
        self._num_bad = 0
        self._in_a_row = 0

    def count(self, outcomes: Iterable[Outcome], step: int) -> None:
        """Count the samples of one row.

        Raises:
            SampleError: when the budget is spent; names the sample that spent it.
        """
        lines = []
        spent: SampleError | None = None
        for outcome in outcomes:
            self._num_seen += 1
            if outcome.skipped is None:
                self._in_a_row = 0
                continue
            self._num_bad += 1
            self._in_a_row += 1
            bad = outcome.skipped
            lines.append({"step": step, "shard": bad.shard, "key": bad.key, "reason": bad.reason})
            why = self._exceeded()
            if why and spent is None:
                spent = SampleError(f"{bad.reason} ({why}{self._advice()})", shard=bad.shard, key=bad.key)
        self._write(lines)
        if spent is not None:
            raise spent

    def _exceeded(self) -> str:
        if self._in_a_row >= self._max_in_a_row:
            return f"{self._in_a_row} samples in a row could not be used, data.max_bad_in_a_row={self._max_in_a_row}"
        if self._num_seen >= CHECKED_FROM and self._num_bad > self._max_fraction * self._num_seen:
            return (
                f"{self._num_bad} of {self._num_seen} samples could not be used, "
                f"data.max_bad_fraction={self._max_fraction}"
            )
        return ""

    def _advice(self) -> str:
        return f"; all are listed in {self._log}" if self._log else ""

    def _write(self, lines: list[dict[str, object]]) -> None:
        """Append in one write, so that the ranks of a run can share the file."""
        if not lines or self._log is None:
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self._log.open("ab", buffering=0) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
