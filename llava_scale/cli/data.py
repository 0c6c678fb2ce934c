"""``llava-scale data``: pack, index, check, split, merge, reshard."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llava_scale.data.check import CheckResult
    from llava_scale.data.manifest import DatasetInfo
    from llava_scale.data.write import PackResult


class PictureFormat(str, enum.Enum):
    """How prepared pictures are stored."""

    jpeg = "jpeg"
    ppm = "ppm"


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
    for command in (pack, index, check, split, merge, reshard):
        app.command()(command)


def pack(
    source: Annotated[Path, typer.Argument(metavar="JSON", help="LLaVA JSON (a list) or JSONL.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    media_root: Annotated[Path | None, typer.Option(help="Folder of the media; the JSON's own by default.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 1000,
    workers: Workers = 0,
    engine: Annotated[EngineName, typer.Option(help="Processes here, or a Ray cluster.")] = EngineName.pool,
    image_size: Annotated[int, typer.Option(min=0, help="Longer side of stored pictures; 0 copies them.")] = 0,
    image_aspect: Annotated[Aspect, typer.Option(help="With --image-size: pad or stretch to a square.")] = Aspect.pad,
    image_format: Annotated[
        PictureFormat, typer.Option(help="With --image-size: JPEG, or the very pixels without compression.")
    ] = PictureFormat.jpeg,
    image_quality: Annotated[int, typer.Option(min=1, max=100, help="With --image-size: JPEG quality.")] = 90,
    image_background: Annotated[str, typer.Option(help="With --image-size: colour of padding.")] = "127,127,127",
    video_frames: Annotated[
        str, typer.Option(help="With --image-size: store frames of videos: a number, or fps=1 for one a second.")
    ] = "",
    audio_rate: Annotated[int, typer.Option(min=0, help="Store sounds as FLAC at this rate; 0 copies them.")] = 0,
    verify: Annotated[Verify, typer.Option(help="Decode copied pictures, or trust their headers.")] = Verify.decode,
    allow_bad: Annotated[int, typer.Option(min=0, help="Bad records that still count as success.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.")] = False,
) -> None:
    """Pack LLaVA JSON and its media into shards with an index; run it again to continue."""
    from llava_scale.data.prepare import MediaOptions
    from llava_scale.data.write import pack as pack_data
    from llava_scale.errors import ConfigError

    options = MediaOptions(
        image_size=image_size,
        image_aspect=image_aspect.value,
        image_format=image_format.value,
        image_quality=image_quality,
        image_background=_color(image_background),
        audio_rate=audio_rate,
        verify=verify.value,
        **_frames(video_frames),
    )
    if not image_size and options != MediaOptions(verify=verify.value, audio_rate=audio_rate):
        raise ConfigError("--image-aspect, --image-format, --image-quality and --image-background need --image-size")
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


def index(
    path: Annotated[str, typer.Argument(help="Folder of *.tar shards.")],
    workers: Workers = 0,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make every index anew, also those that fit.")] = False,
) -> None:
    """Index shards made by other tools, and write dataset.json."""
    from llava_scale.data.foreign import index_folder

    with _progress("shards") as on_progress:
        result = index_folder(path, workers=workers or _processors(), rebuild=rebuild, on_progress=on_progress)
    print(f"{path}: {_holds(result.info)}; {result.num_built:,} indexes made")
    print(f"next: llava-scale data check {path}")


def check(
    path: Annotated[str, typer.Argument(help="Data set: folder or URL.")],
    sample: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the samples to read and decode.")] = 1.0,
    checksums: Annotated[bool, typer.Option(help="Compare the checksum of every shard.")] = True,
    workers: Workers = 0,
    report: Annotated[Path | None, typer.Option(help="Write every problem to this JSONL file.")] = None,
) -> None:
    """Read and decode every sample, compare checksums and keys; exit code 1 if anything is wrong."""
    from dataclasses import asdict

    from llava_scale.data.check import check_dataset

    with _progress("shards") as on_progress:
        result = check_dataset(
            path, share=sample, checksums=checksums, workers=workers or _processors(), on_progress=on_progress
        )
    if report is not None:
        report.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in result.problems), encoding="utf-8")
    _print_check(result, path)
    if result.problems:
        raise typer.Exit(1)


def split(
    path: Annotated[str, typer.Argument(help="Data set: folder or URL.")],
    train: Annotated[Path, typer.Argument(help="New folder for most of the samples.")],
    heldout: Annotated[Path, typer.Argument(help="New folder for the held-out share.")],
    share: Annotated[float, typer.Option(help="Held-out share, between 0 and 1.")] = 0.02,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 1000,
) -> None:
    """Copy a data set into a training and a held-out part, chosen by the hash of the key."""
    from llava_scale.data.repack import split as split_data

    with _progress("samples") as on_progress:
        infos = split_data(path, train, heldout, share=share, shard_size=shard_size, on_progress=on_progress)
    for out, info in zip((train, heldout), infos, strict=True):
        print(f"{out}: {_holds(info)}")


def merge(
    paths: Annotated[list[str], typer.Argument(help="Data sets, then the new folder.", metavar="PATH... OUT")],
    link: Annotated[bool, typer.Option("--link", help="Hard links instead of copies.")] = False,
    allow_duplicates: Annotated[
        bool, typer.Option("--allow-duplicates", help="Let a key appear more than once.")
    ] = False,
) -> None:
    """Put the shards of several data sets into one folder."""
    from llava_scale.data.repack import merge as merge_data
    from llava_scale.errors import ConfigError

    if len(paths) < 2:
        raise ConfigError("give one data set or more, and then the new folder")
    *sources, out = paths
    with _progress("bytes") as on_progress:
        info = merge_data(sources, Path(out), link=link, allow_duplicates=allow_duplicates, on_progress=on_progress)
    print(f"{out}: {_holds(info)}")


def reshard(
    path: Annotated[str, typer.Argument(help="Data set: folder or URL.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    shard_size: Annotated[int, typer.Option(min=0, help="Samples in a shard.")] = 0,
    num_shards: Annotated[int, typer.Option(min=0, help="Number of shards, all of one size (+-1).")] = 0,
) -> None:
    """Copy a data set, in order, into shards of another size or number."""
    from llava_scale.data.repack import reshard as reshard_data

    with _progress("samples") as on_progress:
        info = reshard_data(path, out, shard_size=shard_size, num_shards=num_shards, on_progress=on_progress)
    print(f"{out}: {_holds(info)}")


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
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
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


def _holds(info: DatasetInfo) -> str:
    return f"{sum(info.num_samples):,} samples in {len(info.names):,} shards, {_size(sum(info.num_bytes))}"


def _print_check(result: CheckResult, path: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=path)
    for column in ("media", "count", "bytes", "width x height (least, mean, most)", "seconds (least, mean, most)"):
        table.add_column(column, justify="left" if column == "media" else "right")
    for kind, stats in result.kinds.items():
        if stats.count:
            spans = (stats.low, stats.mean(), stats.high)
            sizes = "  ".join(f"{width:.0f}x{height:.0f}" for width, height, _ in spans) if stats.high[0] else "-"
            seconds = "  ".join(f"{duration:.1f}" for _, _, duration in spans) if stats.high[2] else "-"
            table.add_row(kind, f"{stats.count:,}", _size(stats.num_bytes), sizes, seconds)
    console = Console()
    if table.row_count:
        console.print(table)
    usable = max(1, sum(result.modalities.values()))
    per_kind = ", ".join(f"{name} {count:,}" for name, count in sorted(result.modalities.items()))
    print(f"{result.num_checked:,} of {result.num_samples:,} samples read: {per_kind or 'none usable'}")
    print(f"{result.num_turns / usable:.1f} turns and {result.text_chars / usable:.0f} characters a sample")
    if not result.problems:
        print("all well")
        return
    print(f"{len(result.problems):,} problems:", file=sys.stderr)
    for problem in result.problems[:_SHOWN]:
        where = f"{problem.shard}: sample {problem.key!r}" if problem.key else problem.shard
        print(f"  {where}: {problem.reason}", file=sys.stderr)
    if len(result.problems) > _SHOWN:
        print("  ... (all of them: --report FILE)", file=sys.stderr)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _frames(text: str) -> dict[str, Any]:
    """``8`` or ``fps=1`` as fields of ``MediaOptions``."""
    from llava_scale.errors import ConfigError

    by_rate = text.startswith("fps=")
    try:
        number = float(text.removeprefix("fps=")) if by_rate else int(text or 0)
    except ValueError:
        number = -1
    if number < 0 or (text and not number):
        raise ConfigError(f"--video-frames must be a number of frames or fps=RATE, got {text!r}")
    return {"video_fps" if by_rate else "video_frames": number}


def _color(text: str) -> tuple[int, int, int]:
    from llava_scale.errors import ConfigError

    parts = text.split(",")
    if len(parts) == 3 and all(part.strip().isdigit() and int(part) < 256 for part in parts):
        red, green, blue = (int(part) for part in parts)
        return red, green, blue
    raise ConfigError(f"--image-background must be R,G,B with values of 0 to 255, e.g. 122,116,104; got {text!r}")
