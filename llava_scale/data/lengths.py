"""How many tokens the text of each sample takes, measured once per tokenizer and remembered.

Lengths are measured when the planner first asks for them and kept in one small file per shard, in a folder of the
cache named by the encoder's fingerprint. Ranks and later runs share the files; a file that is torn or belongs to other
content is measured anew.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import zlib
from collections import OrderedDict
from contextlib import ExitStack
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llava_scale.data.files import locked, temporary_name
from llava_scale.data.store import cache_folder
from llava_scale.errors import SampleError

if TYPE_CHECKING:
    from pathlib import Path

    from llava_scale.data.chat import ChatEncoder
    from llava_scale.data.dataset import ShardedDataset
    from llava_scale.data.order import IntArray

UNREADABLE = -1
"""Length of a sample whose record cannot be used; reading it says why."""

_UNKNOWN = -2
_HEADER = struct.Struct("<4sIQ")  # magic, CRC-32 of the lengths, number of samples
_MAGIC = b"LSL1"
_NUM_LOCKS = 64
_MAX_TABLES = 1024
_SHARDS_AHEAD = 4  # whose records are fetched while others are measured

_log = logging.getLogger(__name__)


class ShardGroup(NamedTuple):
    """The part of a list of samples that lies in one shard."""

    shard: int
    where: IntArray
    """Positions in the list."""
    inside: IntArray
    """Numbers inside the shard, in the order of ``where``."""


def by_shard(dataset: ShardedDataset, numbers: IntArray) -> list[ShardGroup]:
    """Group sample numbers by the shard that holds them."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    groups = []
    start = 0
    while start < len(ordered):
        shard, _ = dataset.locate(int(ordered[start]))
        span = dataset.shard_range(shard)
        stop = int(np.searchsorted(ordered, span.stop))
        groups.append(ShardGroup(shard, order[start:stop], ordered[start:stop] - span.start))
        start = stop
    return groups


class TextLengths:
    """Tokens of the text of every sample of a data set, media not counted. Thread-safe.

    Args:
        dataset: Samples to measure.
        encoder: Renders and tokenises conversations.
        cache_dir: As ``data.cache_dir``. Where it cannot be written, lengths are kept in memory only.
    """

    def __init__(self, dataset: ShardedDataset, encoder: ChatEncoder, *, cache_dir: str = "") -> None:
        self._dataset = dataset
        self._encoder = encoder
        self._markers = frozenset(encoder.placeholder_ids.values())
        self._folder = cache_folder(cache_dir) / "lengths" / _digest(encoder.fingerprint())
        self._tables: OrderedDict[int, NDArray[np.int32]] = OrderedDict()
        self._writable = True
        self._guard = threading.Lock()

    def of(self, numbers: IntArray) -> IntArray:
        """Tokens of the text of each of ``numbers``; ``UNREADABLE`` where the record cannot be used."""
        with self._guard:
            return self._of(numbers)

    def _of(self, numbers: IntArray) -> IntArray:
        lengths = np.empty(len(numbers), dtype=np.int64)
        groups = _rotated(by_shard(self._dataset, numbers))
        for ahead in groups[:_SHARDS_AHEAD]:
            self._prefetch(ahead)
        for number, group in enumerate(groups):
            for ahead in groups[number + _SHARDS_AHEAD : number + _SHARDS_AHEAD + 1]:
                self._prefetch(ahead)
            found = self._table(group.shard)[group.inside]
            if (found == _UNKNOWN).any():
                found = self._measured(group.shard, group.inside)[group.inside]
            lengths[group.where] = found
        return lengths

    def _prefetch(self, group: ShardGroup) -> None:
        """Start fetching the records that must be measured, if they lie on another machine."""
        missing = group.inside[self._table(group.shard)[group.inside] == _UNKNOWN]
        if len(missing):
            first = self._dataset.shard_range(group.shard).start
            self._dataset.prefetch((missing + first).tolist(), text_only=True)

    def _table(self, shard: int) -> NDArray[np.int32]:
        table = self._tables.get(shard)
        if table is None:
            table = self._load(shard)
            if table is None:
                table = np.full(len(self._dataset.shard_range(shard)), _UNKNOWN, dtype=np.int32)
            self._keep(shard, table)
        else:
            self._tables.move_to_end(shard)
        return table

    def _keep(self, shard: int, table: NDArray[np.int32]) -> None:
        self._tables[shard] = table
        if len(self._tables) > _MAX_TABLES:
            self._tables.popitem(last=False)

    def _measured(self, shard: int, inside: IntArray) -> NDArray[np.int32]:
        """The shard's table with the samples ``inside`` measured, in memory and in the file."""
        with ExitStack() as stack:
            self._lock(shard, stack)
            saved = self._load(shard)
            table = self._table(shard).copy() if saved is None else np.maximum(saved, self._table(shard))
            first = self._dataset.shard_range(shard).start
            for number in inside[table[inside] == _UNKNOWN].tolist():
                table[number] = self._measure(first + number)
            self._save(shard, table)
        self._keep(shard, table)
        return table

    def _measure(self, number: int) -> int:
        try:
            ids = self._encoder.encode(self._dataset.turns(number)).input_ids
        except SampleError:
            return UNREADABLE
        return len(ids) - sum(map(self._markers.__contains__, ids))

    def _path(self, shard: int) -> Path:
        index = self._dataset.index(shard)
        content = index.tar_sha256 or self._dataset.fingerprint()
        name = _digest(f"{index.name} {index.tar_bytes} {index.num_samples} {content}")
        return self._folder / name[:2] / f"{name}.lengths"

    def _lock(self, shard: int, stack: ExitStack) -> None:
        """Let one process at a time measure a shard, until ``stack`` closes."""
        if self._writable:
            try:
                stack.enter_context(locked(self._folder / f".lock-{shard % _NUM_LOCKS:02d}"))
            except OSError as error:
                self._give_up(error)

    def _load(self, shard: int) -> NDArray[np.int32] | None:
        try:
            raw = self._path(shard).read_bytes()
        except OSError:
            return None
        count = len(self._dataset.shard_range(shard))
        if len(raw) != _HEADER.size + 4 * count:
            return None
        body = raw[_HEADER.size :]
        if _HEADER.unpack_from(raw) != (_MAGIC, zlib.crc32(body), count):
            return None
        return np.frombuffer(body, dtype="<i4").astype(np.int32)

    def _save(self, shard: int, table: NDArray[np.int32]) -> None:
        if not self._writable:
            return
        body = table.astype("<i4").tobytes()
        path = self._path(shard)
        temporary = temporary_name(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(_HEADER.pack(_MAGIC, zlib.crc32(body), len(table)) + body)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writable = False
        _log.warning(
            "token lengths cannot be kept in %s (%s) and are measured again in every run; set data.cache_dir",
            self._folder,
            error.strerror or error,
        )


def _rotated(groups: list[ShardGroup]) -> list[ShardGroup]:
    """Start elsewhere in each process: ranks that ask for the same shards then measure different ones."""
    shift = os.getpid() % max(1, len(groups))
    return groups[shift:] + groups[:shift]


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=12).hexdigest()
