"""``llava-scale data toy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add ``toy`` to the ``data`` commands."""
    app.command()(toy)


def toy(
    out: Annotated[Path, typer.Argument(help="Folder for train.json, test.json and media/.")],
    num_samples: Annotated[int, typer.Option(help="Training samples.")] = 3000,
    num_test: Annotated[int, typer.Option(help="Test samples; a tenth of the training samples if 0.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    modalities: Annotated[
        str, typer.Option(help="Comma-separated: image, video, audio, video_audio, text.")
    ] = "image,text",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Make a synthetic data set in LLaVA's format: coloured shapes, sounds, and questions that need them."""
    from rich.console import Console

    from llava_scale.data.toy.samples import write_toy

    names = tuple(name.strip() for name in modalities.split(",") if name.strip())
    result = write_toy(out, num_samples=num_samples, num_test=num_test, seed=seed, modalities=names, workers=workers)
    Console().print(
        f"{result.num_train} training samples in {result.train_json}\n{result.num_test} test samples in "
        f"{result.test_json}\nnext: llava-scale data pack {result.train_json} {out}/train --media-root {out}"
    )
