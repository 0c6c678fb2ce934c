"""Write one shard: tar and index, whole or not at all, and the same bytes for the same samples."""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from llava_scale.data.files import publish, sync, temporary_name
from llava_scale.data.index import IndexBuilder, MediaEntry, SampleEntry, ShardIndex, group_media, media_order
from llava_scale.data.indexing import describe
from llava_scale.data.names import RECORD_SUFFIX, escape_key, media_suffix
from llava_scale.data.opening import index_name
from llava_scale.data.tarwalk import BLOCK
from llava_scale.errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from llava_scale.types import MediaInfo, MediaKind

_RECORD = 20 * BLOCK  # tars end at a multiple of this


@dataclass(frozen=True, slots=True)
class NewMedia:
    """A file to be stored with a sample; ``number``, ``frame`` and ``info`` as in ``MediaEntry``."""

    kind: MediaKind
    ext: str
    number: int
    frame: int
    data: bytes
    info: MediaInfo


class ShardWriter:
    """Context manager that writes samples to ``path``; the shard appears under its name when it is finished.

    The index is written after the tar, so a shard with a matching index is whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = temporary_name(path)
        self._digest = hashlib.sha256()
        self._builder = IndexBuilder()
        self._keys: set[str] = set()
        self._position = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        self._file = self._temporary.open("wb", buffering=1 << 20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    @property
    def num_samples(self) -> int:
        """Samples written so far."""
        return len(self._builder.samples)

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._position

    def add(self, key: str, record: bytes, media: Sequence[NewMedia]) -> None:
        """Append a sample: its media by kind, number and frame, numbered anew without gaps, then its record.

        ``key`` is the id, unescaped.

        Raises:
            ShardError: if the shard has that key already.
        """
        if key in self._keys:
            raise ShardError(f"{self._path.name}: key {key!r} would be in it twice; give one of the samples another id")
        self._keys.add(key)
        stored = escape_key(key)
        ordered = sorted(media, key=lambda item: media_order(_entry(item)))
        groups = group_media([_entry(item) for item in ordered])
        contents = iter(ordered)
        seen: Counter[MediaKind] = Counter()
        counts = Counter(group[0].kind for group in groups)
        entries = []
        written: dict[int, bytes] = {}
        for group in groups:
            kind = group[0].kind
            for entry in group:
                suffix = media_suffix(kind, entry.ext, seen[kind], entry.frame, count=counts[kind])
                data = next(contents).data
                offset = self._append(f"{stored}.{suffix}", data)
                written[offset] = data
                entries.append(entry._replace(number=seen[kind], offset=offset))
            seen[kind] += 1
        offset = self._append(f"{stored}.{RECORD_SUFFIX}", record)
        described, text_chars = describe(record, entries, lambda offset, size: written[offset])
        self._builder.add(SampleEntry(key, offset, len(record), tuple(described)), text_chars=text_chars)

    def finish(self) -> ShardIndex:
        """Give the shard its name, write its index beside it, and return that."""
        assert self._file is not None
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self._position % _RECORD))
        self._file.flush()
        sync(self._file.fileno())
        self._file.close()
        self._file = None
        index = self._builder.build(self._path.name, tar_bytes=self._position, tar_sha256=self._digest.hexdigest())
        index_path = self._path.with_name(index_name(self._path.name))
        index_path.unlink(missing_ok=True)
        publish(self._temporary, self._path)
        index.save(index_path)
        return index

    def _append(self, name: str, data: bytes) -> int:
        """Write a member; return where its bytes start."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        header.mode = 0o644
        self._write(header.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
        offset = self._position
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)


def _entry(item: NewMedia) -> MediaEntry:
    return MediaEntry(item.kind, item.ext, item.number, item.frame, 0, len(item.data), item.info)
