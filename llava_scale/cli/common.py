"""What several commands share: options, loading a model, bars on the terminal."""

from __future__ import annotations

import enum
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import TaskID

    from llava_scale.serving.engine import Engine


class Dtype(str, enum.Enum):
    """Type of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a model, such as RUN/final.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of the weights; auto keeps the one they were saved in.")]


def load_engine(checkpoint: Path, device: str, dtype: Dtype) -> Engine:
    """Load a checkpoint, without bars of other libraries."""
    from transformers.utils.logging import disable_progress_bar

    from llava_scale.serving import engine

    disable_progress_bar()
    return engine.load_engine(checkpoint, device=device, dtype=dtype.value)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show named bars on the terminal; yields a function of (name, done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:

        def show(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = bar.add_task(name, total=total)
            bar.update(bars[name], completed=done, total=total)

        yield show
