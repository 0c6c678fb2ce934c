"""``llava-scale precompute``: features of frozen towers, once instead of in every epoch."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from llava_scale.training.precompute import Precomputed


class StoredType(str, enum.Enum):
    """Type in which features are stored."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Add ``precompute`` to ``app``."""
    app.command()(precompute)


def precompute(
    config: Path = typer.Argument(..., help="Recipe of the run that will read the features."),
    out: Path = typer.Argument(..., help="Folder for them; one that was begun is completed."),
    overrides: list[str] | None = typer.Argument(None, metavar="[KEY=VALUE]...", help="Settings that win."),
    dtype: StoredType = typer.Option(
        StoredType.auto, help="auto: float32 where the run computes in float32, else bfloat16."
    ),
    batch_size: int = typer.Option(32, min=1, help="Pictures, frames or sounds that go through a tower at once."),
) -> None:
    """Write the features of frozen towers for all data of CONFIG into OUT; train then with data.features=OUT.

    On several devices: torchrun --nproc-per-node 8 --no-python llava-scale precompute CONFIG OUT
    """
    from transformers.utils.logging import disable_progress_bar

    from llava_scale.cli.common import progress
    from llava_scale.config import load_config
    from llava_scale.training.precompute import precompute as compute
    from llava_scale.training.process_group import open_ranks

    disable_progress_bar()
    settings = load_config(config, overrides or [])
    timeout_s = settings.train.parallel.timeout_s
    with open_ranks(os.environ, device=settings.train.device, timeout_s=timeout_s) as ranks, progress() as bar:
        done = compute(
            settings,
            out,
            dtype=dtype.value,
            batch_size=batch_size,
            ranks=ranks,
            on_shard=(lambda number, total: bar("shards", number, total)) if ranks.is_first else None,
        )
        is_first = ranks.is_first
    if is_first:
        _print(done, config, out)


def _print(done: Precomputed, config: Path, out: Path) -> None:
    there = f", {done.num_there:,} were there" if done.num_there else ""
    typer.echo(
        f"{done.num_media:,} media ({', '.join(done.kinds)}) of {done.num_shards:,} shards in {done.seconds:,.1f} s"
        f"{there}; {done.num_bytes / 1e9:,.2f} GB"
    )
    if done.unusable:
        shown = ", ".join(done.unusable[:5]) + (" ..." if len(done.unusable) > 5 else "")
        typer.echo(f"{len(done.unusable):,} samples cannot be read and will be skipped in training: {shown}")
    typer.echo(f"next        llava-scale train {config} data.features={out}")
