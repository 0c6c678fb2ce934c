"""Files that are either whole or absent: atomic writes, and locks that a kill releases."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

TEMPORARY = ".tmp-"
"""Part of the name of every file that is being written."""


def temporary_name(path: Path) -> Path:
    """Return a hidden name beside ``path`` that nobody else uses."""
    return path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:8]}")


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds the old bytes or all of the new ones, whenever the power goes."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            sync(file.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(descriptor: int) -> None:
    """Flush a file to the device."""
    os.fsync(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its final name, and make the name durable."""
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable (file systems that cannot are left to their own guarantees)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files of killed writers in ``folder``; return how many there were."""
    stale = [path for path in folder.iterdir() if path.name.startswith(".") and TEMPORARY in path.name]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``, alone or with other ``shared`` holders, waiting for it.

    The kernel frees it when its holder dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def try_locked(path: Path, *, wait_s: float = 0.0) -> Iterator[bool]:
    """Yield whether the lock file ``path`` could be taken within ``wait_s`` seconds; hold it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _take(descriptor, wait_s)
    finally:
        os.close(descriptor)


def _take(descriptor: int, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
