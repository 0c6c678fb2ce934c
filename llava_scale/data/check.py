"""Go through a data set and say what is wrong with it, and what it holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from llava_scale.data.dataset import ShardedDataset, open_dataset
from llava_scale.data.engines import run_tasks
from llava_scale.data.index import heldout_mask
from llava_scale.data.indexing import checksum
from llava_scale.data.opening import read_through
from llava_scale.data.records import FRAMES_EXT, encoded_media, split_frames, text_length
from llava_scale.errors import LlavaScaleError, SampleError
from llava_scale.types import MEDIA_KINDS, Clip, MediaInfo, MediaKind, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

_BATCH = 32


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong: in a sample, or (without ``key``) in a whole shard."""

    shard: str
    key: str
    reason: str


@dataclass(slots=True)
class KindStats:
    """What the media of one kind are like; ``low`` and ``high`` are (width, height, seconds)."""

    count: int = 0
    num_bytes: int = 0
    low: tuple[float, float, float] = (np.inf, np.inf, np.inf)
    high: tuple[float, float, float] = (0.0, 0.0, 0.0)
    total: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def add(self, info: MediaInfo, num_bytes: int) -> None:
        """Count one medium."""
        values = (float(info.width), float(info.height), info.duration_s)
        self.merge(KindStats(1, num_bytes, values, values, values))

    def merge(self, other: KindStats) -> None:
        """Count all of ``other``."""
        self.count += other.count
        self.num_bytes += other.num_bytes
        self.low = _each(min, self.low, other.low)
        self.high = _each(max, self.high, other.high)
        self.total = _each(lambda a, b: a + b, self.total, other.total)

    def mean(self) -> tuple[float, float, float]:
        """Return mean width, height and seconds."""
        width, height, seconds = (value / max(1, self.count) for value in self.total)
        return width, height, seconds


@dataclass(slots=True)
class CheckResult:
    """What ``check_dataset`` found.

    Attributes:
        num_samples: Samples in the data set.
        num_checked: Samples that were read and decoded.
        num_turns: Their turns.
        text_chars: Characters of their turns.
        modalities: Samples per combination of media.
        kinds: Statistics of the media that were read, per kind.
        problems: Everything wrong, shard by shard; empty if all is well.
    """

    num_samples: int = 0
    num_checked: int = 0
    num_turns: int = 0
    text_chars: int = 0
    modalities: Counter[str] = field(default_factory=Counter)
    kinds: dict[MediaKind, KindStats] = field(default_factory=lambda: {kind: KindStats() for kind in MEDIA_KINDS})
    problems: list[Problem] = field(default_factory=list)

    def merge(self, other: CheckResult) -> None:
        """Add what was found in another shard."""
        self.num_checked += other.num_checked
        self.num_turns += other.num_turns
        self.text_chars += other.text_chars
        self.modalities.update(other.modalities)
        self.problems += other.problems
        for kind, stats in self.kinds.items():
            stats.merge(other.kinds[kind])


@dataclass(frozen=True, slots=True)
class _Task:
    path: str
    fingerprint: str
    shard: int
    share: float
    checksums: bool
    max_pixels: int


def check_dataset(
    path: str,
    *,
    share: float = 1.0,
    checksums: bool = True,
    workers: int = 1,
    max_image_pixels: int = 100_000_000,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CheckResult:
    """Check every shard: sizes, checksums and indexes fit; every record parses; every picture decodes; keys are unique.

    Videos and sounds are opened, their header is read.

    Args:
        path: Data set.
        share: Share of the samples to read and decode, chosen by the hash of their key; keys are always compared.
        checksums: Compare the SHA-256 of every shard, which reads all of it.
        workers: Processes.
        max_image_pixels: Larger pictures are problems.
        on_progress: Called with (shards done, shards in all).

    Raises:
        ShardError: if there is no data set at ``path``.
    """
    data = open_dataset(path)
    fingerprint = data.fingerprint()
    tasks = [_Task(path, fingerprint, s, share, checksums, max_image_pixels) for s in range(data.num_shards)]
    found: dict[int, tuple[CheckResult, NDArray[np.uint64]]] = {}
    for task, result in run_tasks(_check_shard, tasks, workers=workers):
        found[task.shard] = result
        on_progress(len(found), len(tasks))
    total = CheckResult(num_samples=len(data))
    for s in range(data.num_shards):
        total.merge(found[s][0])
    total.problems += _duplicates(data, [found[s][1] for s in range(data.num_shards)])
    return total


@lru_cache(maxsize=1)
def _opened(path: str, fingerprint: str) -> ShardedDataset:
    """Return the data set, opened once in each worker; ``fingerprint`` tells versions of it apart."""
    del fingerprint
    return open_dataset(path)


def _check_shard(task: _Task) -> tuple[CheckResult, NDArray[np.uint64]]:
    result = CheckResult()
    data = _opened(task.path, task.fingerprint)
    name = data.shard_name(task.shard)
    hashes = np.empty(0, np.uint64)
    try:
        index = data.index(task.shard)
        hashes = np.array(index.key_hashes)
        if task.checksums:
            found = checksum(read_through(data.store, name, index.tar_bytes), index.tar_bytes)
            if found != index.tar_sha256:
                reason = f"SHA-256 is {found}, its index says {index.tar_sha256}; the shard changed or is damaged"
                result.problems.append(Problem(name, "", reason))
        chosen = np.flatnonzero(heldout_mask(hashes, task.share)) + data.shard_range(task.shard).start
        for sample, infos in _samples(data, chosen.tolist()):
            _check_sample(sample, infos, task, result)
    except LlavaScaleError as error:
        result.problems.append(Problem(name, "", str(error)))
    return result, hashes


def _samples(data: ShardedDataset, numbers: list[int]) -> Iterator[tuple[Sample | SampleError, tuple[MediaInfo, ...]]]:
    for start in range(0, len(numbers), _BATCH):
        batch = numbers[start : start + _BATCH]
        yield from zip(data.samples(batch), map(data.media_infos, batch), strict=True)


def _check_sample(sample: Sample | SampleError, infos: tuple[MediaInfo, ...], task: _Task, result: CheckResult) -> None:
    result.num_checked += 1
    if isinstance(sample, SampleError):
        result.problems.append(Problem(sample.shard, sample.key, sample.reason))
        return
    result.num_turns += len(sample.turns)
    result.text_chars += text_length(sample.turns)
    result.modalities["+".join(kind for kind in MEDIA_KINDS if kind in sample.media) or "text"] += 1
    files = [(kind, *file) for kind in MEDIA_KINDS for file in sample.media.get(kind, ())]
    clips = [medium.clip for kind in MEDIA_KINDS for medium in encoded_media(sample).get(kind, ())]
    for number, ((kind, ext, content), info, clip) in enumerate(zip(files, infos, clips, strict=True)):
        result.kinds[kind].add(info, len(content))
        try:
            _decode(kind, ext, content, clip, task.max_pixels)
        except SampleError as error:
            result.problems.append(Problem(sample.shard, sample.key, f"medium {number + 1} ({ext}): {error.reason}"))


def _decode(kind: MediaKind, ext: str, content: bytes, clip: Clip | None, max_pixels: int) -> None:
    from llava_scale.data.media import decode_image, probe

    if kind == "image":
        decode_image(content, max_pixels=max_pixels)
    elif ext == FRAMES_EXT:
        for _, frame in split_frames(content):
            decode_image(frame, max_pixels=max_pixels)
    else:
        probe("wav" if kind == "audio" else ext, content, clip)  # of a video that is a sound, its track


def _duplicates(data: ShardedDataset, hashes: list[NDArray[np.uint64]]) -> list[Problem]:
    """Return one problem for every further appearance of a key."""
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = values[counts > 1]
    first: dict[str, str] = {}
    problems = []
    for s in range(data.num_shards) if repeated.size else ():
        for j in np.flatnonzero(np.isin(hashes[s], repeated)).tolist():
            key, name = data.index(s).key(j), data.shard_name(s)
            if key in first:
                problems.append(Problem(name, key, f"the key is also in {first[key]}; keys must be unique"))
            first.setdefault(key, name)
    return problems


def _each(
    function: Callable[[float, float], float], left: tuple[float, float, float], right: tuple[float, float, float]
) -> tuple[float, float, float]:
    first, second, third = (function(a, b) for a, b in zip(left, right, strict=True))
    return first, second, third
