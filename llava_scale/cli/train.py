"""``llava-scale train``: start or continue a run."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from llava_scale.config import Config
    from llava_scale.training.summary import TrainResult


def register(app: typer.Typer) -> None:
    """Add ``train`` and ``export-checkpoint`` to ``app``."""
    app.command()(train)
    app.command("export-checkpoint")(export_checkpoint)


def train(
    config: Path = typer.Argument(..., help="Recipe as YAML; a run folder's config.yaml is one too."),
    overrides: list[str] | None = typer.Argument(None, metavar="[KEY=VALUE]...", help="Settings that win."),
    resume: bool = typer.Option(False, "--resume", help="Continue the run in train.output_dir."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Do everything but the steps; write nothing."),
    print_config: bool = typer.Option(False, "--print-config", help="Print the resolved config and stop."),
) -> None:
    """Train as CONFIG says; KEY=VALUE changes a setting: train.steps=100 data.sources.0.weight=2.

    On several devices: torchrun --nproc-per-node 8 --no-python llava-scale train CONFIG
    """
    from llava_scale.config import load_config, to_yaml

    settings = load_config(config, overrides or [])
    if print_config:
        typer.echo(to_yaml(settings), nl=False)
    if dry_run:
        _dry_run(settings, resume=resume)
    elif not print_config:
        raise typer.Exit(run(settings, resume=resume))


def export_checkpoint(
    run_folder: Path = typer.Argument(..., metavar="RUN", help="Run folder; the run may be going on."),
    out: Path = typer.Argument(..., help="New folder for the model."),
    step: int | None = typer.Option(None, min=0, help="Step of the checkpoint; the newest whole one without it."),
) -> None:
    """Write a checkpoint, sharded or not, as a plain model folder (from_pretrained); adapters are merged."""
    from llava_scale.training.export import export_checkpoint as export

    done = export(run_folder, out, step=step)
    typer.echo(f"step {done:,} of {run_folder} is a model in {out}")
    typer.echo(f"next        llava-scale chat {out} --image PICTURE 'QUESTION'")


def run(settings: Config, *, resume: bool) -> int:
    """Train with progress on the terminal, and return the exit code.

    Under torchrun this is one process of many; the first one talks.
    """
    from transformers.utils.logging import disable_progress_bar

    from llava_scale.training.parallel import PeerError
    from llava_scale.training.process_group import open_ranks
    from llava_scale.training.trackers import ConsoleTracker
    from llava_scale.training.trainer import train as run_training

    disable_progress_bar()  # one bar is enough
    try:
        timeout_s = settings.train.parallel.timeout_s
        with open_ranks(os.environ, device=settings.train.device, timeout_s=timeout_s) as ranks:
            if not ranks.is_first:
                logging.getLogger("llava_scale").setLevel(logging.ERROR)
            result = run_training(settings, resume=resume, trackers=[ConsoleTracker()], ranks=ranks)
    except PeerError:
        return 2  # the first process tells why
    except KeyboardInterrupt:
        typer.echo(
            f"stopped at once; continue with: llava-scale train {settings.train.output_dir}/config.yaml --resume"
        )
        return 128 + signal.SIGINT
    if ranks.is_first:
        _print_closing(result)
    return result.exit_code


def _dry_run(settings: Config, *, resume: bool) -> None:
    from rich.console import Console

    from llava_scale.training.trackers import print_summary
    from llava_scale.training.trainer import dry_run

    summary, batch = dry_run(settings, resume=resume)
    print_summary(Console(), summary)
    rows = batch.rows
    num_tokens = sum(int(row.cu_seq_lens[-1]) for row in rows)
    typer.echo(
        f"first   {len(rows):,} rows, {sum(len(row.keys) for row in rows):,} samples, {num_tokens:,} tokens "
        f"({sum(row.num_visual_tokens for row in rows):,} visual, {sum(row.num_supervised for row in rows):,} "
        "supervised)"
    )
    typer.echo("dry run: nothing was trained or written; leave out --dry-run to start")


def _print_closing(result: TrainResult) -> None:
    held_out = result.evaluation.get("eval/loss")
    parts = [
        f"{result.steps:,} of {result.total_steps:,} steps in {result.seconds:,.1f} s",
        f"{result.samples:,} samples",
        *([f"loss {result.loss:.4f}"] if result.loss is not None else []),
        *([f"held-out loss {held_out:.4f}"] if held_out is not None else []),
        *([f"{result.skipped:,} skipped samples (skipped.jsonl)"] if result.skipped else []),
        *([f"{result.bad_steps:,} steps left out (not finite)"] if result.bad_steps else []),
    ]
    if result.stopped_by is not None:
        typer.echo(f"stopped by {signal.Signals(result.stopped_by).name}; everything is saved")
    typer.echo(", ".join(parts))
    if result.checkpoint is not None:
        typer.echo(f"checkpoint  {result.checkpoint}")
    if result.final_dir is not None:
        typer.echo(f"model       {result.final_dir}")
    typer.echo(f"{'next' if result.final_dir else 'continue':<12}{result.next_command}")
