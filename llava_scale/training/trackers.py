"""Where the lines of a run go: console, JSONL, and whatever implements ``Tracker``."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from llava_scale.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from llava_scale.training.summary import RunSummary


class Tracker:
    """Follows a run. Every method may be left as it is; all are called in the training process, between steps."""

    def open(self, summary: RunSummary) -> None:
        """Take in the opening summary; called once, before the first step."""

    def step(self, step: int) -> None:
        """Note that ``step`` steps are finished; must be cheap."""

    def log(self, line: dict[str, Any]) -> None:
        """Take in a line of the log: always ``step``, and a part of the metrics."""

    def note(self, text: str) -> None:
        """Take in a sentence for people."""

    def close(self) -> None:
        """Finish; called once, also after an error."""


class Trackers(Tracker):
    """Several trackers as one."""

    def __init__(self, members: Sequence[Tracker]) -> None:
        self.members = tuple(members)

    def open(self, summary: RunSummary) -> None:
        """Pass on the summary."""
        for member in self.members:
            member.open(summary)

    def step(self, step: int) -> None:
        """Pass on the step."""
        for member in self.members:
            member.step(step)

    def log(self, line: dict[str, Any]) -> None:
        """Pass on the line."""
        for member in self.members:
            member.log(line)

    def note(self, text: str) -> None:
        """Pass on the sentence."""
        for member in self.members:
            member.note(text)

    def close(self) -> None:
        """Close every member."""
        for member in self.members:
            member.close()


class JsonlTracker(Tracker):
    """Appends every line to a file, one JSON object each, readable while the run goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def log(self, line: dict[str, Any]) -> None:
        """Write the line through to the file.

        Raises:
            CheckpointError: the file cannot be written.
        """
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror}; mend that, then continue with --resume"
            ) from None

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # what could not be written has been told
            self._file.close()


class CallbackTracker(Tracker):
    """Hands every line to a function."""

    def __init__(self, on_log: Callable[[dict[str, Any]], None]) -> None:
        self._on_log = on_log

    def log(self, line: dict[str, Any]) -> None:
        """Call the function."""
        self._on_log(line)


class ConsoleTracker(Tracker):
    """Tells a person: a summary, a moving bar on a terminal or plain lines elsewhere, and every evaluation.

    Args:
        console: Where to write; standard output if None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._total = 0
        self._pace = _Pace()

    def open(self, summary: RunSummary) -> None:
        """Print the summary and start the bar."""
        print_summary(self._console, summary)
        self._total = summary.total_steps
        self._pace.start(summary.start_step)
        if self._console.is_terminal and summary.start_step < summary.total_steps:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
            )
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("", total=self._total, completed=summary.start_step, text="")
            self._progress.start()

    def step(self, step: int) -> None:
        """Move the bar."""
        self._pace.step(step)
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def log(self, line: dict[str, Any]) -> None:
        """Show a training line in the bar or as text, an evaluation as text."""
        if "lr" in line:
            text = f"{_training_text(line)}  ETA {_duration(self._pace.left_s(self._total))}"
            if self._progress is not None:
                self._progress.update(self._task, text=text)
            else:
                self._print(f"step {line['step']}/{self._total}  {text}")
        elif any(key.startswith("eval/") for key in line):
            scores = "  ".join(f"{key} {_number(value)}" for key, value in line.items() if key != "step")
            self._print(f"step {line['step']}/{self._total}  {scores}")

    def note(self, text: str) -> None:
        """Print the sentence."""
        self._print(text)

    def close(self) -> None:
        """Stop the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Pace:
    """Seconds a step takes, from the steps of the last half minute or more."""

    def __init__(self) -> None:
        self._marks: list[tuple[int, float]] = []
        self._last = (0, 0.0)

    def start(self, step: int) -> None:
        self._last = (step, time.perf_counter())
        self._marks = [self._last]

    def step(self, step: int) -> None:
        self._last = (step, time.perf_counter())
        if self._last[1] - self._marks[-1][1] >= 1.0:
            self._marks = [*self._marks[-30:], self._last]

    def left_s(self, total: int) -> float | None:
        (first_step, first_time), (step, now) = self._marks[0], self._last
        return (total - step) * (now - first_time) / (step - first_step) if step > first_step else None


def print_summary(console: Console, summary: RunSummary) -> None:
    """Print the opening of a run: what is trained, on what, at which cost, and where it goes."""
    table = Table("module", "parameters", "trained", "learning rate", title=f"{summary.name}: stage {summary.stage}")
    for column in table.columns[1:]:
        column.justify = "right"
    for module in summary.modules:
        rates = ", ".join(f"{rate:g}" for rate in module.learning_rates) or "frozen"
        table.add_row(module.name, f"{module.num_parameters:,}", f"{module.num_trainable:,}", rates)
    console.print(table)
    memory = summary.memory
    activations = f" + up to about {memory.activations:.2f} for a row" if memory.activations else " + the rows"
    lines = {
        "data": f"{summary.num_samples:,} samples",
        "step": summary.step_size,
        "steps": f"{summary.total_steps:,} ({summary.epochs:.3g} epochs)"
        + (f", going on at {summary.start_step:,}" if summary.start_step else ""),
        "device": f"{summary.device}, {summary.precision}",
        "memory": f"{memory.weights:.2f} GiB weights + {memory.training:.2f} gradients and optimizer{activations}",
        "output": str(summary.output_dir),
    }
    for name, text in lines.items():
        console.print(f"{name:<8}{text}", highlight=False, markup=False, soft_wrap=True)


def _training_text(line: dict[str, Any]) -> str:
    return (
        f"loss {_number(line['loss'])}  lr {line['lr']:.2e}  {line['tokens_per_s']:,.0f} tokens/s  "
        f"{_mfu_text(line)}"
        f"{_removed_text(line)}waiting {line['data_wait']:.0%}  skipped {line['skipped']}"
    )


def _mfu_text(line: dict[str, Any]) -> str:
    return f"MFU {line['mfu']:.0%}  " if "mfu" in line else ""


def _removed_text(line: dict[str, Any]) -> str:
    if not line.get("removed"):
        return ""
    before, after = line["visual_before_per_sample"], line["visual_per_sample"]
    return f"visual tokens a sample {before:,.0f} to {after:,.0f} (-{line['removed']:.0%})  "


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
