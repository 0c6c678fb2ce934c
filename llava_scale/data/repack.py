"""Rearrange packed data: split by key, merge folders, cut into other shards. Media and records keep their bytes.

The result is built in a hidden folder beside ``out`` and renamed when it is whole. Files in a shard that belong to no
sample (see ``llava_scale.data.names``) are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_scale.data.dataset import ShardedDataset, open_dataset
from llava_scale.data.files import publish, sync, sync_folder, temporary_name
from llava_scale.data.index import ShardIndex, heldout_mask, is_sound_track
from llava_scale.data.manifest import DatasetInfo
from llava_scale.data.opening import index_name, load_index
from llava_scale.data.shard_writer import NewMedia, ShardWriter
from llava_scale.errors import ConfigError, SampleError, ShardError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

_COPY_BLOCK = 8 << 20
_AHEAD = 64
"""Samples fetched together from a remote source."""
_NAMED = 5
"""Duplicates named in a message."""


class ShardSeries:
    """Writes samples into one shard after the other."""

    def __init__(self, folder: Path, sizes: Iterator[int]) -> None:
        self._folder, self._sizes = folder, sizes
        self._stack = contextlib.ExitStack()
        self._writer: ShardWriter | None = None
        self._room = 0
        self.num_shards = 0

    def add(self, data: ShardedDataset, i: int) -> None:
        """Copy sample ``i`` of ``data``."""
        if self._room == 0:
            self.finish()
            self._room = next(self._sizes)
            path = self._folder / f"shard-{self.num_shards:05d}.tar"
            self.num_shards += 1
            self._writer = self._stack.enter_context(ShardWriter(path))
        assert self._writer is not None
        self._writer.add(*_stored(data, i))
        self._room -= 1

    def finish(self) -> None:
        """Finish the shard under way."""
        if self._writer is not None:
            self._writer.finish()
            self._writer = None

    def describe(self, prepared: dict[str, Any]) -> DatasetInfo:
        """Write ``dataset.json`` for all finished shards and return its content."""
        shards = (self._folder / f"shard-{number:05d}.tar" for number in range(self.num_shards))
        info = DatasetInfo.of((load_index(shard) for shard in shards), prepared=prepared)
        info.save(self._folder)
        return info

    def close(self) -> None:
        """Drop a shard that was not finished."""
        self._stack.close()


def split(
    path: str, train: Path, heldout: Path, *, share: float, shard_size: int, on_progress: Callable[[int, int], None]
) -> tuple[DatasetInfo, DatasetInfo]:
    """Copy a data set into two: ``heldout`` gets the samples that ``heldout_mask`` chooses by the hash of their key.

    The same key goes the same way in every data set, and ``data.holdout`` of a training config chooses alike.

    Raises:
        ConfigError: if the share is not between 0 and 1.
        ShardError: if a folder is not empty, or one part would be.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the held-out share must be between 0 and 1, got {share}")
    data = open_dataset(path)
    with building(train) as train_folder, building(heldout) as heldout_folder:
        parts = [ShardSeries(folder, _forever(shard_size)) for folder in (train_folder, heldout_folder)]
        _deal(data, parts, lambda index: heldout_mask(index.key_hashes, share), on_progress)
        for part, out in zip(parts, (train, heldout), strict=True):
            if not part.num_shards:
                raise ShardError(f"{out}: none of the {len(data)} samples of {path} falls here; change the share")
        infos = [part.describe(data.info.prepared) for part in parts]
    return infos[0], infos[1]


def reshard(
    path: str, out: Path, *, shard_size: int = 0, num_shards: int = 0, on_progress: Callable[[int, int], None]
) -> DatasetInfo:
    """Copy a data set, in order, into shards of ``shard_size`` samples, or into ``num_shards`` of equal size (+-1).

    Raises:
        ConfigError: if not exactly one of the two is given, or there are fewer samples than shards.
        ShardError: if ``out`` is not empty.
    """
    if (shard_size > 0) == (num_shards > 0):
        raise ConfigError("give either a shard size or a number of shards")
    data = open_dataset(path)
    if num_shards > len(data):
        raise ConfigError(f"{path} has {len(data)} samples, too few for {num_shards} shards")
    with building(out) as folder:
        series = ShardSeries(folder, _even(len(data), num_shards) if num_shards else _forever(shard_size))
        _deal(data, [series], lambda index: np.zeros(index.num_samples, np.bool_), on_progress)
        return series.describe(data.info.prepared)


def merge(
    paths: Sequence[str],
    out: Path,
    *,
    link: bool = False,
    allow_duplicates: bool = False,
    on_progress: Callable[[int, int], None],
) -> DatasetInfo:
    """Put the shards of several data sets into one folder, renumbered in the order given.

    Args:
        paths: Data sets.
        out: New folder.
        link: Hard links instead of copies (same file system; changing one file then changes both).
        allow_duplicates: Let keys appear more than once.
        on_progress: Called with (bytes done, bytes in all).

    Raises:
        ConfigError: if their media were prepared in different ways.
        ShardError: duplicate keys, a damaged shard, links across file systems, or an ``out`` that is not empty.
    """
    sources = [open_dataset(path) for path in paths]
    if any(data.info.prepared != sources[0].info.prepared for data in sources):
        ways = "; ".join(f"{data.path}: {data.info.prepared or 'as they were'}" for data in sources)
        raise ConfigError(
            f"the media of these data sets were prepared in different ways ({ways}); pack them alike first"
        )
    if not allow_duplicates:
        _refuse_duplicates(sources)
    with building(out) as folder:
        info = DatasetInfo.of(_placed(sources, folder, link, on_progress), prepared=sources[0].info.prepared)
        info.save(folder)
    return info


def find_duplicates(sources: Sequence[ShardedDataset]) -> list[tuple[str, list[str]]]:
    """Return every key that appears more than once, with the places where it does."""
    hashes = [data.index(s).key_hashes for data in sources for s in range(data.num_shards)]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = values[counts > 1]
    places: dict[str, list[str]] = {}
    for data in sources if repeated.size else ():
        for s in range(data.num_shards):
            index = data.index(s)
            for j in np.flatnonzero(np.isin(index.key_hashes, repeated)):
                places.setdefault(index.key(int(j)), []).append(data.store.describe(data.shard_name(s)))
    return [(key, where) for key, where in sorted(places.items()) if len(where) > 1]


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes ``out`` when the block ends well, and disappears when it does not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ShardError(f"{out}: exists and is not empty; choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_name(out)
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _deal(
    data: ShardedDataset,
    parts: list[ShardSeries],
    choose: Callable[[ShardIndex], NDArray[np.bool_]],
    on_progress: Callable[[int, int], None],
) -> None:
    """Copy every sample to the part that ``choose`` names (False the first, True the second)."""
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.callback(part.close)
        for s in range(data.num_shards):
            numbers = data.shard_range(s)
            for number, chosen in zip(numbers, choose(data.index(s)).tolist(), strict=True):
                if (number - numbers.start) % _AHEAD == 0:
                    data.prefetch(range(number, min(number + _AHEAD, numbers.stop)))
                parts[chosen].add(data, number)
            on_progress(numbers.stop, len(data))
        for part in parts:
            part.finish()


def _stored(data: ShardedDataset, i: int) -> tuple[str, bytes, list[NewMedia]]:
    """Return key, record and media of a sample as they lie in its shard."""
    s, j = data.locate(i)
    entry = data.index(s).entry(j)
    if not entry.json_size:
        raise SampleError("has no json member; remove its files or run: llava-scale data check").at(
            shard=data.shard_name(s), key=entry.key
        )
    stored = [medium for medium in entry.media if not is_sound_track(medium)]
    ranges = [(entry.json_offset, entry.json_size), *((medium.offset, medium.size) for medium in stored)]
    record, *files = data.store.read_many(data.shard_name(s), ranges)
    media = [
        NewMedia(medium.kind, medium.ext, medium.number, medium.frame, content, medium.info)
        for medium, content in zip(stored, files, strict=True)
    ]
    return entry.key, record, media


def _placed(
    sources: Sequence[ShardedDataset], folder: Path, link: bool, on_progress: Callable[[int, int], None]
) -> Iterator[ShardIndex]:
    """Bring all shards into ``folder``; yield their indexes."""
    total, done = sum(sum(data.info.num_bytes) for data in sources), 0
    shards = [(data, s) for data in sources for s in range(data.num_shards)]
    for number, (data, s) in enumerate(shards):
        index = data.index(s).renamed(f"shard-{number:05d}.tar")
        _place(data, s, folder / index.name, link=link)
        index.save(folder / index_name(index.name))
        yield index
        done += index.tar_bytes
        on_progress(done, total)


def _place(data: ShardedDataset, s: int, target: Path, *, link: bool) -> None:
    """Bring a shard's tar to ``target``: a hard link, or a copy that is checked on the way."""
    name = data.shard_name(s)
    if link:
        if not data.store.is_local:
            raise ShardError(f"{data.path}: cannot link to a remote shard; merge without --link")
        try:
            os.link(Path(data.store.root) / name, target)
        except OSError as error:
            raise ShardError(
                f"{data.store.describe(name)}: cannot be linked ({error.strerror}); merge without --link"
            ) from None
        return
    digest = hashlib.sha256()
    temporary = temporary_name(target)
    size = data.info.num_bytes[s]
    with temporary.open("wb") as file:
        for offset in range(0, size, _COPY_BLOCK):
            block = data.store.read(name, offset, min(_COPY_BLOCK, size - offset))
            digest.update(block)
            file.write(block)
        file.flush()
        sync(file.fileno())
    if digest.hexdigest() != data.info.sha256[s]:
        raise ShardError(
            f"{data.store.describe(name)}: its SHA-256 is not that of its index; the shard is damaged, copy it again"
        )
    publish(temporary, target)


def _refuse_duplicates(sources: Sequence[ShardedDataset]) -> None:
    duplicates = find_duplicates(sources)
    if duplicates:
        named = "; ".join(f"{key!r} in {', '.join(where)}" for key, where in duplicates[:_NAMED])
        raise ShardError(f"{len(duplicates)} keys appear more than once ({named}); rename them, or --allow-duplicates")


def _forever(size: int) -> Iterator[int]:
    if size < 1:
        raise ConfigError(f"shard size must be at least 1, got {size}")
    while True:
        yield size


def _even(total: int, parts: int) -> Iterator[int]:
    for number in range(parts):
        yield total // parts + (number < total % parts)
