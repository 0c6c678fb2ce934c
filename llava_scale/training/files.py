"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from llava_scale.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill; it takes ``target``'s name, on disk for good, only if the block ends without an error.

    A folder that stands there already is replaced. A process killed at any instant leaves the old one, the new one,
    or (between two renames) the old one as ``.NAME.old``; never a half-written folder under ``target``'s name.

    Raises:
        CheckpointError: the folder cannot be written (disk full, no permission); nothing else was touched.
    """
    partial = begin_folder(target)
    try:
        yield partial
        finish_folder(partial, target)
    except (OSError, SafetensorError) as error:
        discard_folder(partial)
        raise cannot_write(target, error) from error
    except BaseException:
        discard_folder(partial)
        raise


def begin_folder(target: Path) -> Path:
    """Make an empty folder beside ``target``, to be filled and then handed to ``finish_folder``.

    Raises:
        CheckpointError: it cannot be made.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_folder(partial)
        partial.mkdir()
    except OSError as error:
        raise cannot_write(target, error) from error
    return partial


def finish_folder(partial: Path, target: Path) -> None:
    """Give a filled folder the name of ``target``, once everything in it is on disk."""
    _sync_tree(partial)
    _replace(partial, target)


def discard_folder(partial: Path) -> None:
    """Remove a folder that will not be finished."""
    shutil.rmtree(partial, ignore_errors=True)


def cannot_write(target: Path, reason: object) -> CheckpointError:
    """The error of a folder that could not be written."""
    return CheckpointError(
        f"cannot write {target}: {reason}; free space or choose another train.output_dir, then continue with "
        "--resume (earlier checkpoints are untouched)"
    )


def atomic_text(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` always holds the old or the new text in full."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """As ``atomic_text`` for readers beside us, without waiting for the disk."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def remove_folder(path: Path) -> None:
    """Remove a folder if it is there; under a hidden name first, so that no half of it looks whole."""
    if not path.exists():
        return
    doomed = path.with_name(f".{path.name.lstrip('.')}.removed")
    if doomed != path:
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed)


def _replace(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    remove_folder(old)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    _sync(target.parent)
    remove_folder(old)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
