"""What several commands share: options, loading a model, bars on the terminal."""

from __future__ import annotations

import enum
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.progress import TaskID

    from llava_scale.errors import SampleError
    from llava_scale.eval.tasks import Generate, Question
    from llava_scale.serving.engine import Engine
    from llava_scale.types import SkippedSample

_SHOWN = 10  # left out samples on the terminal


class Dtype(str, enum.Enum):
    """Type of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a model, such as RUN/final.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of the weights; auto keeps the one they were saved in.")]


def name_of(checkpoint: Path) -> str:
    """What a model is called: its folder, or that of its run."""
    folder = checkpoint.resolve()
    return folder.parent.name if folder.name == "final" else folder.name


def check_server(package: str, extra: str, *, host: str, port: int) -> None:
    """Find out before a model is loaded whether it could be served.

    Raises:
        MissingExtraError: ``package`` of ``extra`` is not installed.
        ConfigError: nothing can listen at this address.
    """
    import socket
    from importlib.util import find_spec

    from llava_scale.errors import ConfigError, MissingExtraError

    if find_spec(package) is None:
        raise MissingExtraError(package, extra)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from None


def load_engine(checkpoint: Path, device: str, dtype: Dtype) -> Engine:
    """Load a checkpoint, without bars of other libraries."""
    from transformers.utils.logging import disable_progress_bar

    from llava_scale.serving import engine

    disable_progress_bar()
    return engine.load_engine(checkpoint, device=device, dtype=dtype.value)


def asking(engine: Engine, *, max_new_tokens: int = 64, batch_size: int = 16) -> Generate:
    """Return the way in which ``eval`` asks ``engine``: greedily, in batches."""
    from llava_scale.serving.engine import GenerationRequest

    def generate(questions: Sequence[Question]) -> Sequence[str | SampleError]:
        requests = [
            GenerationRequest(turns=question.turns, media=question.media, change=question.change)
            for question in questions
        ]
        return engine.try_generate(requests, max_new_tokens=max_new_tokens, batch_size=batch_size)

    return generate


def print_left_out(skipped: Sequence[SkippedSample], *, name: str = "") -> None:
    """Tell on stderr which samples an evaluation (of the task ``name``) could not use, the first of them one by one."""
    for item in skipped[:_SHOWN]:
        typer.echo(f"left out: {item.shard}: {item.key}: {item.reason}", err=True)
    if skipped:
        typer.echo(f"{name and f'{name}: '}{len(skipped):,} samples or questions left out", err=True)


@contextmanager
def progress(*, shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Show named bars on the terminal, unless not ``shown``; yields a function of (name, done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:

        def show(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = bar.add_task(name, total=total)
            bar.update(bars[name], completed=done, total=total)

        yield show
