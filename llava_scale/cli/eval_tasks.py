"""``llava-scale eval --tasks``: task files, in one process or several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llava_scale.cli.common import Dtype, asking, load_engine, print_left_out, progress
from llava_scale.cli.processes import TIMEOUT_S, run_in_processes

if TYPE_CHECKING:
    from llava_scale.eval.task_file import TaskConfig
    from llava_scale.eval.task_result import TaskResult
    from llava_scale.training.parallel import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """Options of the command.

    Attributes:
        out: Folder for results and answers; None keeps neither.
        batch_size: Questions answered together.
        processes: Processes on this machine.
        fresh: Ask again what was answered already.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: Type of the weights.
    """

    out: Path | None
    batch_size: int
    processes: int
    fresh: bool
    device: str
    dtype: str


def evaluate_tasks(checkpoint: Path, files: Sequence[Path], options: TaskOptions) -> None:
    """Run task files with a checkpoint, print the scores, and write them into ``options.out``.

    Raises:
        ConfigError: a task file is wrong, or two have the same name.
    """
    from llava_scale.errors import ConfigError
    from llava_scale.eval.task_file import load_task

    tasks = [load_task(path) for path in files]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"task names must differ, got {', '.join(names)}; set 'name' in the files")
    if options.processes > 1 and "RANK" not in os.environ:
        raise typer.Exit(_start(checkpoint, files, options))
    from llava_scale.training.parallel import PeerError
    from llava_scale.training.process_group import open_ranks

    try:
        with open_ranks(os.environ, device=options.device, timeout_s=TIMEOUT_S) as ranks:
            _run(checkpoint, tasks, options, ranks)
    except PeerError:
        raise typer.Exit(2) from None  # the first process tells why


def _run(checkpoint: Path, tasks: Sequence[TaskConfig], options: TaskOptions, ranks: Ranks) -> None:
    from llava_scale.eval.answer_cache import checkpoint_digest
    from llava_scale.eval.task_result import write_tasks
    from llava_scale.eval.task_runner import TaskRunner
    from llava_scale.viz.task_page import write_tasks_page

    digest = ranks.from_first(lambda: _prepare(options) or checkpoint_digest(checkpoint))
    engine = load_engine(checkpoint, options.device, Dtype(options.dtype))
    with progress(shown=ranks.is_first) as show:
        runner = TaskRunner(
            model=engine.model,
            processor=engine.processor,
            generate=lambda longest: asking(engine, max_new_tokens=longest, batch_size=options.batch_size),
            digest=f"{digest}-{options.dtype}",
            cache=None if options.out is None else options.out / "answers",
            ranks=ranks,
            on_progress=show,
        )
        results = [runner.run(task) for task in tasks]
    if not ranks.is_first:
        return
    print_results(results)
    if options.out is not None:
        target = write_tasks(results, options.out, checkpoint=str(checkpoint), digest=digest)
        typer.echo(f"written: {target}, {write_tasks_page(options.out)}")


def _prepare(options: TaskOptions) -> str:
    """Drop earlier answers where that was asked for."""
    if options.fresh and options.out is not None:
        for path in (options.out / "answers").glob("*.jsonl"):
            path.unlink()
    return ""


def _start(checkpoint: Path, files: Sequence[Path], options: TaskOptions) -> int:
    """Run the same command in several processes of this machine; return their exit code."""
    arguments = ["eval", str(checkpoint), "--batch-size", str(options.batch_size)]
    arguments += ["--device", options.device, "--dtype", options.dtype]
    arguments += ["--out", str(options.out)] if options.out is not None else []
    arguments += ["--fresh"] if options.fresh else []
    for path in files:
        arguments += ["--tasks", str(path)]
    return run_in_processes(arguments, options.processes)


def print_results(results: Sequence[TaskResult]) -> None:
    """Print the scores of tasks as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", "score", "95 % interval", "answers")
    for result in results:
        for metric, score in result.scores.items():
            interval = "" if score.method == "exact" else f"{score.low:.4g} to {score.high:.4g}"
            table.add_row(result.task.name, metric, f"{score.value:.4g}", interval, f"{score.num_items:,}")
    Console().print(table)
    for result in results:
        if result.num_cached:
            typer.echo(f"{result.task.name}: {result.num_cached:,} answers were there already")
        print_left_out(result.skipped, name=result.task.name)
