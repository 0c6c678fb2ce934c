"""Profile of a few steps: a trace for chrome://tracing or Perfetto, and a table of where the time went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from pathlib import Path

_ROWS = 40


class StepProfiler:
    """Profiles the steps ``first`` to ``last - 1`` (counted from 0) of this process.

    Args:
        steps: ``first:last``, or nothing.
        folder: Where ``steps-10-13.trace.json`` and ``steps-10-13.txt`` go.
        device: Where the model trains.
    """

    def __init__(self, steps: str, folder: Path, device: torch.device) -> None:
        first, _, last = steps.partition(":")
        self._steps = range(int(first), int(last)) if steps else range(0)
        self._folder, self._device = folder, device
        self._running: profile | None = None

    def begin_step(self, step: int) -> None:
        """Begin before the first of the steps, and also where a resumed run starts among them."""
        if step in self._steps and self._running is None:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities)
            self._running.start()

    def end_step(self, step: int) -> Path | None:
        """Write what was found after the last of the steps; return the table's path then."""
        return self.close() if step + 1 >= self._steps.stop else None

    def close(self) -> Path | None:
        """Write what was found so far, if anything runs."""
        if self._running is None:
            return None
        running, self._running = self._running, None
        running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"steps-{self._steps.start}-{self._steps.stop}"
        running.export_chrome_trace(str(self._folder / f"{stem}.trace.json"))
        order = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = self._folder / f"{stem}.txt"
        table.write_text(running.key_averages().table(sort_by=order, row_limit=_ROWS), "utf-8")
        return table
