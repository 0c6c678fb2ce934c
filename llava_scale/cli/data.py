"""``llava-scale data``: pack, index, check, split, merge, reshard."""

from __future__ import annotations

import contextlib
import enum
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llava_scale.data.write import PackResult


class Aspect(str, enum.Enum):
    """How a picture becomes square."""

    pad = "pad"
    resize = "resize"


class Verify(str, enum.Enum):
    """How far pictures are looked at."""

    decode = "decode"
    header = "header"


class EngineName(str, enum.Enum):
    """What runs the work."""

    pool = "pool"
    ray = "ray"


_SHOWN = 10
"""Bad records shown on the terminal."""

Workers = Annotated[int, typer.Option(min=0, help="Processes; 0 takes one per processor (Ray: all of the cluster).")]


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    for command in (pack,):
        app.command()(command)


def pack(
    source: Annotated[Path, typer.Argument(metavar="JSON", help="LLaVA JSON (a list) or JSONL.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    media_root: Annotated[Path | None, typer.Option(help="Folder of the media; the JSON's own by default.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 1000,
    workers: Workers = 0,
    engine: Annotated[EngineName, typer.Option(help="Processes here, or a Ray cluster.")] = EngineName.pool,
    image_size: Annotated[int, typer.Option(min=0, help="Store pictures as squares of this side; 0 copies them.")] = 0,
    image_aspect: Annotated[Aspect, typer.Option(help="With --image-size: pad or stretch to a square.")] = Aspect.pad,
    image_quality: Annotated[int, typer.Option(min=1, max=100, help="With --image-size: JPEG quality.")] = 92,
    image_background: Annotated[str, typer.Option(help="With --image-size: colour of padding.")] = "127,127,127",
    verify: Annotated[Verify, typer.Option(help="Decode copied pictures, or trust their headers.")] = Verify.decode,
    allow_bad: Annotated[int, typer.Option(min=0, help="Bad records that still count as success.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.")] = False,
) -> None:
    """Pack LLaVA JSON and its media into shards with an index; run it again to continue."""
    from llava_scale.data.pack_shard import MediaOptions
    from llava_scale.data.write import pack as pack_data
    from llava_scale.errors import ConfigError

    options = MediaOptions(
        image_size=image_size,
        image_aspect=image_aspect.value,
        image_quality=image_quality,
        image_background=_color(image_background),
        verify=verify.value,
    )
    if not image_size and options != MediaOptions(verify=verify.value):
        raise ConfigError("--image-aspect, --image-quality and --image-background need --image-size")
    with _progress("records") as on_progress:
        result = pack_data(
            source,
            out,
            media_root=media_root or source.parent,
            shard_size=shard_size,
            options=options,
            workers=workers if engine is EngineName.ray else workers or _processors(),
            engine=engine.value,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    _report_pack(result, out)
    if len(result.bad) > allow_bad:
        raise typer.Exit(1)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on the terminal; yield the function that moves it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def _report_pack(result: PackResult, out: Path) -> None:
    kept = f" ({result.num_kept} already there)" if result.num_kept else ""
    print(
        f"{out}: {result.num_samples:,} samples in {result.num_shards:,} shards{kept}, "
        f"{_size(result.num_bytes)}, {result.seconds:.1f} s"
    )
    if not result.bad:
        print(f"next: llava-scale data check {out}")
        return
    print(f"{len(result.bad):,} bad records left out, all listed in {result.report}:", file=sys.stderr)
    for bad in result.bad[:_SHOWN]:
        print(f"  record {bad.record} {bad.id!r}: {bad.reason}", file=sys.stderr)
    if len(result.bad) > _SHOWN:
        print("  ...", file=sys.stderr)
    print(f"mend them and run the command again, or accept them: --allow-bad {len(result.bad)}", file=sys.stderr)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _color(text: str) -> tuple[int, int, int]:
    from llava_scale.errors import ConfigError

    parts = text.split(",")
    if len(parts) == 3 and all(part.strip().isdigit() and int(part) < 256 for part in parts):
        red, green, blue = (int(part) for part in parts)
        return red, green, blue
    raise ConfigError(f"--image-background must be R,G,B with values of 0 to 255, e.g. 122,116,104; got {text!r}")
