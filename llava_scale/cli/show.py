"""``llava-scale show merges | windows | attention``: figures of what a compressor does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from llava_scale.viz.token_maps import Looker

_SHOWN = 4
"""Queries and heads that are shown unless some are named."""

Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="Checkpoint folder such as RUN/final, or recipe (YAML).")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win.")]
ImageOption = Annotated[Path | None, typer.Option(help="Picture to look at.")]
VideoOption = Annotated[Path | None, typer.Option(help="Video to look at, instead of a picture.")]
FramesOption = Annotated[int, typer.Option(min=1, help="Frames of the video, at equal distances.")]


def register(app: typer.Typer) -> None:
    """Add ``show`` to ``app``."""
    group = typer.Typer(help="Figures of what a compressor does to a picture or clip.", no_args_is_help=True,
                        rich_markup_mode=None)  # fmt: skip
    group.command()(merges)
    group.command()(windows)
    group.command()(attention)
    app.add_typer(group, name="show")


def merges(
    source: Source,
    overrides: Overrides = None,
    image: ImageOption = None,
    video: VideoOption = None,
    num_frames: FramesOption = 8,
    ratio: Annotated[list[float] | None, typer.Option(help="Share removed; several times for several maps.")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("merges.png"),
) -> None:
    """Which patches became one token, and how many tokens each frame of a clip kept.

    A recipe needs no training: its vision tower is enough. For a small one without downloads:
    model.preset=tiny model.compressor='{type: token_merging}'
    """
    from llava_scale.viz.tokens import draw_merges

    looker = _open(source, overrides)
    frames = _frames(looker, image, video, num_frames)
    _write(out, draw_merges(_pixels(frames), looker.merges(frames, ratio or ())))


def windows(
    source: Source,
    overrides: Overrides = None,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames of a clip, for queries over whole clips.")] = 1,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("windows.png"),
) -> None:
    """Which part of the token line each query of a qformer sees, and whether some tokens are seen by none."""
    from llava_scale.viz.tokens import draw_windows

    _write(out, draw_windows(*_open(source, overrides).windows(num_frames)))


def attention(
    source: Source,
    overrides: Overrides = None,
    image: ImageOption = None,
    video: VideoOption = None,
    num_frames: FramesOption = 8,
    frame: Annotated[int, typer.Option(min=0, help="Frame of the video that is shown.")] = 0,
    question: Annotated[list[str] | None, typer.Option(help="Instruction; several times to compare.")] = None,
    query: Annotated[list[int] | None, typer.Option(min=0, help="Query; several times for several.")] = None,
    head: Annotated[list[int] | None, typer.Option(min=0, help="Head beside the mean; several times.")] = None,
    layer: Annotated[int, typer.Option(help="Layer; negative ones count from the last.")] = -1,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("attention.png"),
) -> None:
    """What queries of a qformer look at for a given instruction: heat maps over the picture."""
    from llava_scale.errors import ConfigError
    from llava_scale.viz.tokens import draw_attention

    looker = _open(source, overrides)
    frames = _frames(looker, image, video, num_frames)
    maps = [looker.attention(frames, asked, layer=layer, frame=frame) for asked in question or [""]]
    num_heads, num_queries = maps[0].weights.shape[:2]
    queries = query or _spread(num_queries)
    heads = head or (_spread(num_heads)[: _SHOWN - 1] if num_heads > 1 and len(maps) == 1 else [])
    if max(queries) >= num_queries or max(heads, default=0) >= num_heads:
        raise ConfigError(f"there are {num_queries} queries and {num_heads} heads, counted from 0")
    _write(out, draw_attention(_pixels(frames)[frame], maps, queries, heads))


def _open(source: Path, overrides: list[str] | None) -> Looker:
    from transformers.utils.logging import disable_progress_bar

    from llava_scale.viz.token_maps import open_source

    disable_progress_bar()
    return open_source(source, overrides or ())


def _frames(looker: Looker, image: Path | None, video: Path | None, num_frames: int) -> Tensor:
    from llava_scale.errors import ConfigError

    if (image is None) == (video is None):
        raise ConfigError("give either --image or --video")
    if image is not None:
        return looker.picture(image)
    assert video is not None
    return looker.clip(video, num_frames)


def _pixels(frames: Tensor) -> NDArray[np.uint8]:
    """``(T, S, S, 3)``."""
    return frames.permute(0, 2, 3, 1).numpy()


def _spread(number: int) -> list[int]:
    """``_SHOWN`` numbers at equal distances, or all where there are fewer."""
    shown = min(_SHOWN, number)
    return [place * (number - 1) // max(shown - 1, 1) for place in range(shown)]


def _write(path: Path, data: bytes) -> None:
    from llava_scale.errors import ConfigError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another --out") from None
    typer.echo(f"written: {path}")
