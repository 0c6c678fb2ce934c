"""``llava-scale doctor``: what is installed, what works here."""

from __future__ import annotations

import importlib.metadata
import io
import platform
import sys

import typer

_CORE = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "av", "fsspec", "pydantic")
_EXTRAS = {
    "image": ("simplejpeg",),
    "remote": ("aiohttp", "s3fs"),
    "ray": ("ray",),
    "plot": ("matplotlib",),
}


def register(app: typer.Typer) -> None:
    """Add ``doctor`` to ``app``."""
    app.command()(doctor)


def doctor() -> None:
    """Print versions, optional extras and devices, and decode a picture as a self-test."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "found", "note", title="llava-scale doctor")
    table.add_row("python", sys.version.split()[0], platform.platform())
    for name in _CORE:
        version = _version(name)
        table.add_row(name, version or "[red]missing[/red]", "" if version else "pip install llava-scale")
    for extra, names in _EXTRAS.items():
        for name in names:
            version = _version(name)
            table.add_row(name, version or "-", f"extra [{extra}]" + ("" if version else ", not installed"))
    failed = 0
    for title, check in (("device", _device), ("picture", _picture)):
        try:
            table.add_row(title, "ok", check())
        except Exception as error:  # a self-test reports whatever goes wrong on the user's machine
            failed += 1
            table.add_row(title, "[red]failed[/red]", f"{type(error).__name__}: {error}")
    Console().print(table)
    if failed:
        raise typer.Exit(1)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(names)
    return f"CPU, {torch.get_num_threads()} threads"


def _picture() -> str:
    from PIL import Image

    from llava_scale.data.media import decode_image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (255, 0, 0)).save(buffer, format="JPEG")
    pixels = decode_image(buffer.getvalue(), max_pixels=100)
    if tuple(pixels.shape) != (3, 6, 8):
        raise RuntimeError(f"decoded a 8x6 JPEG to {tuple(pixels.shape)}")
    return "JPEG decoded"
