"""Find out what a folder of shards holds: from ``dataset.json``, else from indexes, else from the tars themselves."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

from llava_scale.data.index import INDEX_SUFFIX, ShardIndex
from llava_scale.data.indexing import build_index
from llava_scale.data.manifest import MANIFEST, DatasetInfo
from llava_scale.data.store import Store, cache_folder
from llava_scale.errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_log = logging.getLogger(__name__)

_READ_AHEAD = 8 << 20


def index_name(shard: str) -> str:
    """Return the name of the index file of a shard."""
    return shard.removesuffix(".tar") + INDEX_SUFFIX


def load_index(shard: Path) -> ShardIndex:
    """Return the index that lies beside a local shard."""
    path = shard.with_name(index_name(shard.name))
    return ShardIndex.from_bytes(path.read_bytes(), str(path))


def load_info(store: Store, *, only: str = "", cache_dir: str = "") -> DatasetInfo:
    """Return what the folder holds (or its one shard ``only``).

    Raises:
        ShardError: if there is neither ``dataset.json`` nor a shard, or a bare shard is damaged.
    """
    if only:
        return DatasetInfo.of([_index_of(store, only, store.size(only), cache_dir)])
    try:
        return DatasetInfo.from_bytes(store.read_file(MANIFEST), store.describe(MANIFEST))
    except FileNotFoundError:
        pass
    names = store.list_tars()
    if not names:
        raise ShardError(f"{store.root}: neither {MANIFEST} nor *.tar shards here; pack some: llava-scale data pack")
    _log.info("%s has no %s; reading the indexes of %d shards", store.root, MANIFEST, len(names))
    return DatasetInfo.of(_index_of(store, name, store.size(name), cache_dir) for name in names)


def load_or_build_index(store: Store, info: DatasetInfo, s: int, *, cache_dir: str) -> ShardIndex:
    """Return the index of shard ``s``, checked against ``dataset.json`` and, for a local shard, the tar's size.

    Raises:
        ShardError: if the shard is missing or damaged, or shard, index and ``dataset.json`` do not belong together.
    """
    name = info.names[s]
    size = store.size(name) if store.is_local else info.num_bytes[s]
    if size != info.num_bytes[s]:
        raise _stale(store, name, f"the tar has {size:,} bytes, {MANIFEST} says {info.num_bytes[s]:,}")
    index = _index_of(store, name, size, cache_dir)
    if (index.num_samples, index.tar_sha256) != (info.num_samples[s], info.sha256[s]):
        raise _stale(store, name, f"its index was made for another version of it than {MANIFEST}")
    return index


def read_through(store: Store, name: str, size: int) -> Callable[[int, int], bytes]:
    """Return ``read(offset, size)`` for going through a file once; remote files are read in large pieces."""
    if store.is_local:
        return lambda offset, length: store.read(name, offset, length)
    return _Buffered(store, name, size).read


def _index_of(store: Store, name: str, size: int, cache_dir: str) -> ShardIndex:
    """Return the index beside the shard; without one, that of the cache; without that, build it into the cache."""
    try:
        index = ShardIndex.from_bytes(store.read_file(index_name(name)), store.describe(index_name(name)))
    except FileNotFoundError:
        return _cached_index(store, name, size, cache_dir)
    if index.tar_bytes != size:
        raise _stale(store, name, f"the tar has {size:,} bytes, its index says {index.tar_bytes:,}")
    return index


def _cached_index(store: Store, name: str, size: int, cache_dir: str) -> ShardIndex:
    path = _cache_path(store, name, size, cache_dir)
    try:
        return ShardIndex.from_bytes(path.read_bytes(), str(path))
    except FileNotFoundError:
        pass
    except ShardError as error:
        _log.warning("%s; building it again", error)
    index = build_index(read_through(store, name, size), size, name=name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        index.save(path)
    except OSError as error:
        _log.warning(
            "the index of %s cannot be kept in %s (%s); it is built again every time", name, path.parent, error
        )
    return index


def _cache_path(store: Store, name: str, size: int, cache_dir: str) -> Path:
    identity = f"{store.describe(name)}\0{size}\0{store.version(name)}".encode("utf-8", "surrogatepass")
    return cache_folder(cache_dir) / "indexes" / (hashlib.blake2b(identity, digest_size=16).hexdigest() + INDEX_SUFFIX)


def _stale(store: Store, name: str, reason: str) -> ShardError:
    return ShardError(
        f"{store.describe(name)}: {reason}; if the shard is right run: llava-scale data index {store.root}, "
        "else copy it again"
    )


class _Buffered:
    """Sequential reader with one large buffer, for walking through a remote tar."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self._store, self._name, self._size = store, name, size
        self._start, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        if not self._start <= offset <= offset + size <= self._start + len(self._data):
            length = min(max(size, _READ_AHEAD), self._size - offset)
            self._start, self._data = offset, self._store.read(self._name, offset, length)
        return self._data[offset - self._start : offset - self._start + size]
