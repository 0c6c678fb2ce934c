"""Local copies of remote shards, shared by all processes of a machine and limited in size.

A copy appears under its name only when it is whole: it is downloaded under a lock to ``*.part``, checked, flushed and
renamed. Locks are the kernel's, so a killed process leaves none behind; its ``*.part`` is removed by the next one
that needs room. The least recently used copies make way for new ones. The folder must be on a local disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from llava_scale.data.files import locked, sync, sync_folder, try_locked
from llava_scale.errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_NUM_LOCKS = 256
_DOWNLOADS = 2
"""Tries to get a shard with the right checksum."""

_log = logging.getLogger(__name__)


class ShardCache:
    """Whole shards in ``folder``, at most ``limit_bytes`` together (downloads under way included)."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._shards = folder / "shards"
        self._locks = folder / "locks"

    def fetch(
        self, url: str, size: int, sha256: str, download: Callable[[], Iterable[tuple[int, bytes]]]
    ) -> Path | None:
        """Return a whole local copy of ``url``, downloading it if no process of this machine has done so.

        Args:
            url: Identity of the shard, with ``size`` and ``sha256``.
            size: Its bytes.
            sha256: Its checksum; "" skips that check.
            download: Yields (offset, bytes) that cover it, in order.

        Returns:
            The path, or None where the shard does not fit into the cache or the disk is full or read-only. Another
            process may remove the copy at any time to make room; an open file stays readable.

        Raises:
            ShardError: if what was downloaded is not the shard that was expected.
        """
        identity = f"{url}\0{size}\0{sha256}".encode("utf-8", "surrogatepass")
        name = hashlib.blake2b(identity, digest_size=16).hexdigest()
        path = self._shards / f"{name}.tar"
        if _touch(path, size):
            return path
        if size > self.limit_bytes:
            return None
        try:
            with locked(self._lock_of(name)):
                if _touch(path, size):
                    return path
                return self._download(url, path, size, sha256, download)
        except OSError as error:
            _log.warning("cannot keep a copy of %s in %s (%s); reading it by ranges", url, self.folder, error)
            return None

    def num_bytes(self) -> int:
        """Return the bytes of all copies, finished or under way."""
        return sum(entry.size for entry in self._entries())

    def _download(
        self, url: str, path: Path, size: int, sha256: str, download: Callable[[], Iterable[tuple[int, bytes]]]
    ) -> Path | None:
        self._shards.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        if not self._reserve(part, size):
            return None
        try:
            found = ""
            for _ in range(_DOWNLOADS):
                found = self._fill(part, size, download())
                if found == sha256 or not sha256:
                    break
                _log.warning("%s: SHA-256 is %s instead of %s", url, found, sha256)
            else:
                raise ShardError(
                    f"{url}: SHA-256 is {found}, dataset.json says {sha256}; the shard changed or was damaged on the "
                    "way: run again, else make the index anew: llava-scale data index FOLDER"
                )
            part.replace(path)
            sync_folder(path.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return path

    @staticmethod
    def _fill(part: Path, size: int, pieces: Iterable[tuple[int, bytes]]) -> str:
        """Write the pieces; return the checksum of all."""
        digest = hashlib.sha256()
        position = 0
        with part.open("r+b") as file:
            for offset, data in pieces:
                assert offset == position
                file.write(data)
                digest.update(data)
                position += len(data)
            assert position == size
            file.flush()
            sync(file.fileno())
        return digest.hexdigest()

    def _reserve(self, part: Path, size: int) -> bool:
        """Remove old copies until ``size`` bytes are free, then take them for ``part``."""
        with locked(self.folder / "room.lock"):
            self._drop_abandoned()
            entries = sorted(self._entries(), key=lambda entry: entry.used_ns)
            excess = sum(entry.size for entry in entries) + size - self.limit_bytes
            for entry in entries:
                if excess > 0 and entry.path.suffix == ".tar":
                    entry.path.unlink(missing_ok=True)
                    excess -= entry.size
            if excess > 0:
                return False
            with part.open("wb") as file:
                file.truncate(size)
            return True

    def _drop_abandoned(self) -> None:
        """Remove downloads whose process is gone: nobody holds their lock."""
        for part in self._shards.glob("*.part"):
            with try_locked(self._lock_of(part.stem)) as free:
                if free:
                    part.unlink(missing_ok=True)

    def _lock_of(self, name: str) -> Path:
        return self._locks / f"{int(name[:8], 16) % _NUM_LOCKS:02x}.lock"

    def _entries(self) -> Iterator[_Entry]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._shards) as found:
            for item in found:
                with contextlib.suppress(FileNotFoundError):
                    status = item.stat()
                    yield _Entry(Path(item.path), status.st_size, status.st_mtime_ns)


class _Entry:
    """A file of the cache."""

    __slots__ = ("path", "size", "used_ns")

    def __init__(self, path: Path, size: int, used_ns: int) -> None:
        self.path, self.size, self.used_ns = path, size, used_ns


def _touch(path: Path, size: int) -> bool:
    """Mark a whole copy as just used; return whether there is one."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except OSError:
        return False
    return True
