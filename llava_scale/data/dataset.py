"""A folder (or URL) of shards as one numbered collection of samples.

Start-up reads ``dataset.json`` only; indexes are loaded when a shard is first touched, so it costs the same for a
thousand samples as for a hundred million, but for the list of shards.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from llava_scale.data.index import MediaEntry, SampleEntry, ShardIndex, group_media, is_framed
from llava_scale.data.indexing import count_media
from llava_scale.data.manifest import DatasetInfo
from llava_scale.data.names import NO_FRAME
from llava_scale.data.opening import load_info, load_or_build_index
from llava_scale.data.records import FRAMES_EXT, join_frames, load_record, parse_record
from llava_scale.data.store import RetryPolicy, Store, local_path, open_store
from llava_scale.errors import SampleError, ShardError
from llava_scale.types import MediaInfo, MediaKind, Sample, Turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LOADED_INDEXES = 256
_NOWHERE = SampleEntry("", 0, 0, ())


class ShardedDataset:
    """Samples numbered from 0 in the order of the shards. Thread-safe; pickling reopens files on the other side.

    Attributes:
        name: Name in logs and counters.
        path: Folder or URL.
        info: Content of ``dataset.json``.
        store: Where the bytes come from.
    """

    def __init__(self, info: DatasetInfo, store: Store, *, name: str, path: str, cache_dir: str) -> None:
        self.name = name
        self.path = path
        self.info = info
        self.store = store
        self._cache_dir = cache_dir
        self._starts = [0, *accumulate(info.num_samples)]
        self._total = self._starts[-1]
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._lock = threading.Lock()
        store.expect(info.names, info.num_bytes, info.sha256)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"info": self.info, "store": self.store, "name": self.name, "path": self.path}
        return {**kept, "cache_dir": self._cache_dir}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return self._total

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.info.names)

    def shard_name(self, s: int) -> str:
        """Return the file name of shard ``s``."""
        return self.info.names[s]

    def shard_range(self, s: int) -> range:
        """Return the numbers of the samples in shard ``s``."""
        return range(self._starts[s], self._starts[s + 1])

    def locate(self, i: int) -> tuple[int, int]:
        """Return the shard of sample ``i`` and its position inside.

        Raises:
            IndexError: if there is no such sample.
        """
        if not 0 <= i < self._total:
            raise IndexError(f"sample {i} of {self._total} in data set {self.name!r}")
        s = bisect_right(self._starts, i) - 1
        return s, i - self._starts[s]

    def index(self, s: int) -> ShardIndex:
        """Return the index of shard ``s``; the most recently used ones are kept.

        Raises:
            ShardError: if the shard or its index is missing, damaged, or they do not belong together.
        """
        with self._lock:
            index = self._indexes.get(s)
            if index is not None:
                self._indexes.move_to_end(s)
                return index
        index = load_or_build_index(self.store, self.info, s, cache_dir=self._cache_dir)
        with self._lock:
            self._indexes[s] = index
            if len(self._indexes) > _LOADED_INDEXES:
                self._indexes.popitem(last=False)
        return index

    def key(self, i: int) -> str:
        """Return the key of sample ``i``."""
        s, j = self.locate(i)
        return self.index(s).key(j)

    def key_hash(self, i: int) -> int:
        """Return the 64-bit hash of the key of sample ``i``."""
        s, j = self.locate(i)
        return int(self.index(s).key_hashes[j])

    def media_infos(self, i: int) -> tuple[MediaInfo, ...]:
        """Return what is known of the media of sample ``i``, by kind (image, video, audio), then number."""
        s, j = self.locate(i)
        return self.index(s).media_infos(j)

    def turns(self, i: int) -> tuple[Turn, ...]:
        """Return the conversation of sample ``i``; its media are not read.

        Raises:
            SampleError: if its record breaks a rule of ``parse_record``.
        """
        s, entry = self._entry(i)
        try:
            record = load_record(self.store.read(self.shard_name(s), entry.json_offset, entry.json_size))
            return parse_record(record, count_media(entry.media))
        except SampleError as error:
            raise error.at(shard=self.shard_name(s), key=entry.key) from None

    def sample(self, i: int) -> Sample:
        """Return sample ``i`` with its media still encoded.

        A video stored as frames arrives as one medium with extension ``frames`` (see ``records.split_frames``).

        Raises:
            SampleError: if its record breaks a rule of ``parse_record``.
            ShardError: if its bytes cannot be read.
        """
        s, entry = self._entry(i)
        return _make_sample(entry, self.store.read_many(self.shard_name(s), _ranges(entry)), self.shard_name(s))

    def samples(self, numbers: Sequence[int]) -> Iterator[Sample | SampleError]:
        """Yield several samples in the order asked; a bad one as its error.

        Remote ones are fetched together before the first. Local ones are read one by one, so that each finds the memory
        of the one before it, which the processor still holds.

        Raises:
            ShardError: if bytes cannot be read.
        """
        located: list[tuple[str, SampleEntry]] = [("", _NOWHERE)] * len(numbers)
        fetched: dict[int, list[bytes]] = {}
        for s, places in self._by_shard(numbers):
            shard, index = self.shard_name(s), self.index(s)
            for place, j in places:
                located[place] = (shard, index.entry(j))
            if not self.store.is_local:
                entries = [located[place][1] for place, _ in places]
                data = iter(self.store.read_many(shard, [item for entry in entries for item in _ranges(entry)]))
                for (place, _), entry in zip(places, entries, strict=True):
                    fetched[place] = [next(data) for _ in _ranges(entry)]
        for place, (shard, entry) in enumerate(located):
            data_of_sample = fetched.pop(place) if fetched else self.store.read_many(shard, _ranges(entry))
            try:
                sample: Sample | SampleError = _make_sample(entry, data_of_sample, shard)
            except SampleError as error:
                sample = error
            yield sample

    def prefetch(self, numbers: Sequence[int], *, text_only: bool = False) -> None:
        """Start fetching samples (or only their records) that will be read soon; nothing to do for local files."""
        if self.store.is_local:
            return
        for s, places in self._by_shard(numbers):
            index = self.index(s)
            ranges = [item for _, j in places for item in _ranges(index.entry(j))[: 1 if text_only else None]]
            self.store.prefetch(self.shard_name(s), ranges)

    def fingerprint(self) -> str:
        """Return a digest that changes whenever a shard, or the order of the shards, changes."""
        return self.info.fingerprint()

    def close(self) -> None:
        """Release files and threads; reading again reopens them."""
        self.store.close()

    def _entry(self, i: int) -> tuple[int, SampleEntry]:
        s, j = self.locate(i)
        return s, self.index(s).entry(j)

    def _by_shard(self, numbers: Sequence[int]) -> list[tuple[int, list[tuple[int, int]]]]:
        """Return per shard the (place in ``numbers``, position inside the shard) of the samples asked for."""
        located = sorted((*self.locate(number), place) for place, number in enumerate(numbers))
        return [
            (s, [(place, j) for _, j, place in group]) for s, group in groupby(located, key=lambda located: located[0])
        ]


def open_dataset(
    path: str,
    *,
    name: str = "",
    cache_dir: str = "",
    cache_size_gb: float = 0.0,
    retry: RetryPolicy | None = None,
) -> ShardedDataset:
    """Return the data set at ``path``.

    Args:
        path: Folder or fsspec URL with ``dataset.json``, or with bare ``*.tar`` shards (these are indexed now, and the
            result is kept in the cache folder); or one ``.tar``; or the ``dataset.json`` itself.
        name: Name in logs; the folder's name if empty.
        cache_dir: Folder for indexes and copies of remote shards; ``~/.cache/llava_scale`` if empty.
        cache_size_gb: Limit of local copies of remote shards; 0 reads byte ranges without copies.
        retry: Patience with failing remote reads.

    Raises:
        ShardError: if there is no data set, or a bare shard is damaged.
    """
    folder, file = _split_path(path)
    store = open_store(folder, cache_dir=cache_dir, cache_size_gb=cache_size_gb, retry=retry)
    info = load_info(store, only=file, cache_dir=cache_dir)
    if not sum(info.num_samples):
        raise ShardError(f"{path}: the data set has no samples; pack some: llava-scale data pack JSON {path}")
    return ShardedDataset(info, store, name=name or _last_part(folder), path=path, cache_dir=cache_dir)


def _split_path(path: str) -> tuple[str, str]:
    """Return the folder, and the ``.tar`` inside it that ``path`` names ("" for all of the folder)."""
    if not path.endswith((".tar", "/dataset.json")) and path != "dataset.json":
        return path, ""
    folder, _, file = path.rpartition("/")
    local = local_path(path)
    if local is not None and local.is_dir():
        return path, ""
    return folder or ".", file if file.endswith(".tar") else ""


def _last_part(path: str) -> str:
    local = local_path(path)
    return local.resolve().name if local is not None else path.rstrip("/").rpartition("/")[2]


def _ranges(entry: SampleEntry) -> list[tuple[int, int]]:
    return [(entry.json_offset, entry.json_size), *[(medium.offset, medium.size) for medium in entry.media]]


def _make_sample(entry: SampleEntry, data: list[bytes], shard: str) -> Sample:
    record, *files = data
    try:
        content = load_record(record)
        turns = parse_record(content, count_media(entry.media))
    except SampleError as error:
        raise error.at(shard=shard, key=entry.key) from None
    content.pop("id", None)
    del content["conversations"]
    return Sample(key=entry.key, shard=shard, turns=turns, media=_make_media(entry, files), extra=content)


def _make_media(entry: SampleEntry, files: list[bytes]) -> dict[MediaKind, tuple[tuple[str, bytes], ...]]:
    if not is_framed(entry.media):
        found: dict[MediaKind, tuple[tuple[str, bytes], ...]] = {}
        for item, data in zip(entry.media, files, strict=True):
            found[item.kind] = (*found.get(item.kind, ()), (item.ext, data))
        return found
    media: dict[MediaKind, list[tuple[str, bytes]]] = {}
    remaining = iter(files)
    for entries in group_media(entry.media):
        stored = [(item.ext, next(remaining)) for item in entries]
        media.setdefault(entries[0].kind, []).append(_as_one(entries, stored))
    return {kind: tuple(items) for kind, items in media.items()}


def _as_one(entries: tuple[MediaEntry, ...], stored: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    return stored[0] if entries[0].frame == NO_FRAME else (FRAMES_EXT, join_frames(stored))
