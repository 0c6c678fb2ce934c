"""The index of one shard: where each sample's bytes lie and what is known of its media without opening them.

File ``shard-00000.index`` beside ``shard-00000.tar``, little-endian:

    magic ``LSINDEX1`` | header size u32 | data size u64 | CRC-32 of header and data u32 | header | data

The header is JSON (shard name, bytes and SHA-256 of the tar, number of samples and media, extensions); the data are
the columns of ``_COLUMNS`` one after another, each starting at a multiple of 8 bytes, so that loading copies nothing.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llava_scale.data.files import write_atomic
from llava_scale.data.names import EXTENSIONS, NO_FRAME
from llava_scale.errors import ShardError
from llava_scale.types import MEDIA_KINDS, MediaInfo, MediaKind

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

INDEX_SUFFIX = ".index"
FORMAT_VERSION = 1
NO_TEXT = -1
"""Text length of a sample whose record cannot be read."""

_MAGIC = b"LSINDEX1"
_PREFIX = struct.Struct("<8sIQI")
_SAMPLE_COLUMNS = {
    "key_end": "<u4",
    "key_hash": "<u8",
    "json_offset": "<u8",
    "json_size": "<u4",
    "text_chars": "<i4",
    "media_end": "<u4",
}
_MEDIA_COLUMNS = {
    "kind": "<u1",
    "ext": "<u1",
    "number": "<i4",
    "frame": "<i4",
    "offset": "<u8",
    "size": "<u8",
    "width": "<u4",
    "height": "<u4",
    "num_frames": "<u4",
    "duration_ms": "<u4",
}
_KEY_COLUMN = {"keys": "<u1"}
_SAMPLE_ROW = struct.Struct("<IIQIII")  # key start, key end, json offset, json size, media start, media end
_MEDIA_ROW = struct.Struct("<BBiiQQIIII")  # _MEDIA_COLUMNS
_COLUMNS = {**_SAMPLE_COLUMNS, **_MEDIA_COLUMNS, **_KEY_COLUMN}
_INFO_COLUMNS = ("kind", "width", "height", "num_frames", "duration_ms")
_KINDS: dict[MediaKind, int] = {kind: number for number, kind in enumerate(MEDIA_KINDS)}


class MediaEntry(NamedTuple):
    """One stored file of a sample.

    Attributes:
        kind: Kind of medium; a frame stored ahead of time belongs to a video.
        ext: Extension, lower case, without dot.
        number: Number among the media of its kind.
        frame: Number of the frame inside its video, ``NO_FRAME`` for a whole file.
        offset: First byte in the tar.
        size: Bytes.
        info: What its header says.
    """

    kind: MediaKind
    ext: str
    number: int
    frame: int
    offset: int
    size: int
    info: MediaInfo


class SampleEntry(NamedTuple):
    """One sample of a shard: its record and its media, ordered by kind (image, video, audio), number, frame.

    ``json_size`` is 0 where the shard has no record for the key.
    """

    key: str
    json_offset: int
    json_size: int
    media: tuple[MediaEntry, ...]


def key_hash(key: str) -> int:
    """Return the 64-bit hash of a key: the same on every machine and in every version."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def heldout_mask(hashes: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Return which samples belong to the held-out part of ``share`` in [0, 1]; depends on the keys alone.

    The held-out part of a smaller share lies inside that of a larger one.
    """
    return (hashes >> np.uint64(11)).astype(np.float64) < share * 2.0**53


def media_order(entry: MediaEntry) -> tuple[int, int, int]:
    """Sort key of the media of a sample: kind, number, frame."""
    return _KINDS[entry.kind], entry.number, entry.frame


def is_sound_track(entry: MediaEntry) -> bool:
    """Whether a sound is the track of a video of its sample and shares that video's bytes."""
    return entry.kind == "audio" and EXTENSIONS.get(entry.ext) == "video"


def is_framed(media: Sequence[MediaEntry]) -> bool:
    """Whether a video among ``media`` is stored as frames."""
    for entry in media:  # noqa: SIM110  # a generator would cost more than the few that there are
        if entry.frame != NO_FRAME:
            return True
    return False


def group_media(media: Sequence[MediaEntry]) -> list[tuple[MediaEntry, ...]]:
    """Return one tuple of entries per medium: a file alone, or all stored frames of one video."""
    if not is_framed(media):
        return [(entry,) for entry in media]
    grouped: list[tuple[MediaEntry, ...]] = []
    for (_, _, whole), group in groupby(media, lambda entry: (entry.kind, entry.number, entry.frame == NO_FRAME)):
        entries = tuple(group)
        grouped.extend(((entry,) for entry in entries) if whole else (entries,))
    return grouped


def media_info(entries: tuple[MediaEntry, ...]) -> MediaInfo:
    """Return what is known of one medium from its file, or from all of its stored frames."""
    first = entries[0]
    if first.frame == NO_FRAME:
        return first.info
    return replace(first.info, num_frames=len(entries), duration_s=max(entry.info.duration_s for entry in entries))


class ShardIndex:
    """Columnar index of one shard; immutable, shares the bytes that it was loaded from.

    Attributes:
        name: File name of the tar.
        tar_bytes: Size of the tar that it describes.
        tar_sha256: SHA-256 of the tar, hexadecimal.
        num_samples: Samples in the shard.
        key_hashes: ``(num_samples,)`` uint64, ``key_hash`` of every key.
        text_chars: ``(num_samples,)`` int32, characters of all turns, placeholders included; ``NO_TEXT`` where
            the record cannot be read.
    """

    def __init__(self, header: dict[str, Any], columns: dict[str, NDArray[Any]], raw: bytes) -> None:
        self._raw = raw
        self._columns = columns
        self._extensions: list[str] = header["extensions"]
        self._keys = columns["keys"].tobytes()
        self.name: str = header["name"]
        self.tar_bytes: int = header["tar_bytes"]
        self.tar_sha256: str = header["tar_sha256"]
        self.num_samples: int = header["num_samples"]
        self.key_hashes: NDArray[np.uint64] = columns["key_hash"]
        self.text_chars: NDArray[np.int32] = columns["text_chars"]

    def __len__(self) -> int:
        return self.num_samples

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex.from_bytes, (self._raw, self.name)

    def key(self, i: int) -> str:
        """Return the key of sample ``i``, unescaped."""
        ends = self._columns["key_end"]
        start = ends.item(i - 1) if i else 0
        return self._keys[start : ends.item(i)].decode("utf-8", "surrogatepass")

    def entry(self, i: int) -> SampleEntry:
        """Return where everything of sample ``i`` lies."""
        samples, media = self._rows
        key_start, key_end, offset, size, first, stop = _SAMPLE_ROW.unpack_from(samples, i * _SAMPLE_ROW.size)
        key = self._keys[key_start:key_end].decode("utf-8", "surrogatepass")
        places = range(first * _MEDIA_ROW.size, stop * _MEDIA_ROW.size, _MEDIA_ROW.size)
        return SampleEntry(
            key, offset, size, tuple([self._as_entry(*_MEDIA_ROW.unpack_from(media, at)) for at in places])
        )

    def media_infos(self, i: int) -> tuple[MediaInfo, ...]:
        """Return what is known of the media of sample ``i``, by kind (image, video, audio), then number."""
        return tuple(media_info(entries) for entries in group_media(self.entry(i).media))

    def media_infos_of(self, numbers: NDArray[np.int64]) -> list[tuple[MediaInfo, ...]]:
        """Return ``media_infos`` of many samples at once; equal media share one object."""
        columns = self._columns
        rows, counts = self._media_rows(numbers)
        if (columns["frame"][rows] != NO_FRAME).any():
            return [self.media_infos(number) for number in numbers.tolist()]
        facts = zip(*(columns[name][rows].tolist() for name in _INFO_COLUMNS), strict=True)
        infos = [_shared_info(*fact) for fact in facts]
        starts = np.cumsum(counts) - counts
        return [
            _shared_tuple(infos[start]) if count == 1 else tuple(infos[start : start + count])
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        ]

    def media_counts(self) -> dict[MediaKind, NDArray[np.int64]]:
        """Return per kind how many media each sample has; the stored frames of a video count as one."""
        columns = self._columns
        ends = columns["media_end"].astype(np.int64)
        owner = np.repeat(np.arange(self.num_samples), np.diff(ends, prepend=0))
        first = np.ones(len(owner), np.bool_)
        framed = columns["frame"] != NO_FRAME
        same = (owner[1:] == owner[:-1]) & (columns["number"][1:] == columns["number"][:-1])
        first[1:] = ~(same & framed[1:] & framed[:-1])
        return {
            kind: np.bincount(owner[first & (columns["kind"] == code)], minlength=self.num_samples)
            for kind, code in _KINDS.items()
        }

    def renamed(self, name: str) -> ShardIndex:
        """Return the same index for a tar of another name."""
        header, data_start = _read_header(self._raw, self.name)
        return ShardIndex.from_bytes(_assemble({**header, "name": name}, self._raw[data_start:]), name)

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return self._raw

    def save(self, path: Path) -> None:
        """Write the index atomically."""
        write_atomic(path, self._raw)

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> ShardIndex:
        """Read an index; ``source`` names it in messages.

        Raises:
            ShardError: if the bytes are no whole index of a known version.
        """
        header, position = _read_header(data, source)
        columns: dict[str, NDArray[Any]] = {}
        for table, count in (
            (_SAMPLE_COLUMNS, header["num_samples"]),
            (_MEDIA_COLUMNS, header["num_media"]),
            (_KEY_COLUMN, header["key_bytes"]),
        ):
            for name, dtype in table.items():
                columns[name] = np.frombuffer(data, dtype, count, position)
                position += _padded(columns[name].nbytes)
        return cls(header, columns, data)

    @cached_property
    def _rows(self) -> tuple[bytes, bytes]:
        """Samples and media row by row: one sample is read from them ten times faster than from the columns."""
        columns = self._columns
        samples = np.zeros(self.num_samples, _packed(("u4", "u4", "u8", "u4", "u4", "u4")))
        for number, name in ((1, "key_end"), (2, "json_offset"), (3, "json_size"), (5, "media_end")):
            samples[f"f{number}"] = columns[name]
        samples["f0"][1:], samples["f4"][1:] = columns["key_end"][:-1], columns["media_end"][:-1]
        media = np.zeros(len(columns["kind"]), _packed(tuple(_MEDIA_COLUMNS.values())))
        for number, name in enumerate(_MEDIA_COLUMNS):
            media[f"f{number}"] = columns[name]
        return samples.tobytes(), media.tobytes()

    def _media_rows(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of the media of many samples, one sample after the other, and how many each has."""
        ends = self._columns["media_end"]
        stops = ends[numbers].astype(np.int64)
        counts = stops - np.where(numbers > 0, ends[numbers - 1], 0)
        return np.arange(int(counts.sum())) + np.repeat(stops - np.cumsum(counts), counts), counts

    def _as_entry(self, kind: int, ext: int, number: int, frame: int, offset: int, size: int, *look: int) -> MediaEntry:
        info = _shared_info(kind, *look)
        return MediaEntry(info.kind, self._extensions[ext], number, frame, offset, size, info)


@dataclass(slots=True)
class IndexBuilder:
    """Collects the samples of one shard, in order, and makes its index."""

    keys: list[bytes] = field(default_factory=list)
    samples: list[tuple[int, ...]] = field(default_factory=list)
    media: list[tuple[int, ...]] = field(default_factory=list)
    _key_bytes: int = 0

    def add(self, sample: SampleEntry, *, text_chars: int) -> None:
        """Append a sample; its media are put in order."""
        encoded = sample.key.encode("utf-8", "surrogatepass")
        self.keys.append(encoded)
        self._key_bytes += len(encoded)
        extensions = list(EXTENSIONS)
        for entry in sorted(sample.media, key=media_order):
            info = entry.info
            place = (_KINDS[entry.kind], extensions.index(entry.ext), entry.number, entry.frame)
            look = (info.width, info.height, info.num_frames, round(info.duration_s * 1000))
            self.media.append((*place, entry.offset, entry.size, *look))
        self.samples.append(
            (self._key_bytes, key_hash(sample.key), sample.json_offset, sample.json_size, text_chars, len(self.media))
        )

    def build(self, name: str, *, tar_bytes: int, tar_sha256: str) -> ShardIndex:
        """Return the index of the shard ``name``."""
        header = {
            "version": FORMAT_VERSION,
            "name": name,
            "tar_bytes": tar_bytes,
            "tar_sha256": tar_sha256,
            "num_samples": len(self.samples),
            "num_media": len(self.media),
            "key_bytes": self._key_bytes,
            "extensions": list(EXTENSIONS),
        }
        columns = {"keys": np.frombuffer(b"".join(self.keys), np.uint8)}
        for table, names in ((self.samples, _SAMPLE_COLUMNS), (self.media, _MEDIA_COLUMNS)):
            for number, (column, dtype) in enumerate(names.items()):
                columns[column] = np.array([row[number] for row in table], dtype=dtype)
        data = b"".join(_pad(columns[column].tobytes()) for column in _COLUMNS)
        return ShardIndex.from_bytes(_assemble(header, data), name)


@lru_cache(maxsize=4096)
def _shared_info(kind: int, width: int, height: int, num_frames: int, duration_ms: int) -> MediaInfo:
    return MediaInfo(
        kind=MEDIA_KINDS[kind], width=width, height=height, num_frames=num_frames, duration_s=duration_ms / 1000.0
    )


@lru_cache(maxsize=4096)
def _shared_tuple(info: MediaInfo) -> tuple[MediaInfo, ...]:
    return (info,)


def _packed(types: tuple[str, ...]) -> np.dtype[Any]:
    """Fields ``f0``, ``f1``, ... of little-endian numbers without gaps."""
    return np.dtype([(f"f{number}", f"<{name.lstrip('<')}") for number, name in enumerate(types)])


def _assemble(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + _PREFIX.size) % 8)
    crc = zlib.crc32(data, zlib.crc32(text))
    return _PREFIX.pack(_MAGIC, len(text), len(data), crc) + text + data


def _read_header(raw: bytes, source: str) -> tuple[dict[str, Any], int]:
    """Return the header of a checked index, and where its columns start."""
    broken = f"{source}: the index is damaged or cut off; {_rebuild()}"
    if len(raw) < _PREFIX.size:
        raise ShardError(broken)
    magic, header_size, data_size, crc = _PREFIX.unpack_from(raw)
    if magic != _MAGIC:
        raise ShardError(f"{source}: not an index of llava-scale; {_rebuild()}")
    body = memoryview(raw)[_PREFIX.size :]
    if len(body) != header_size + data_size or zlib.crc32(body) != crc:
        raise ShardError(broken)
    header: dict[str, Any] = json.loads(bytes(body[:header_size]))
    if header["version"] != FORMAT_VERSION:
        raise ShardError(f"{source}: index version {header['version']}, this is {FORMAT_VERSION}; {_rebuild()}")
    return header, _PREFIX.size + header_size


def _rebuild() -> str:
    return "make it anew: llava-scale data index FOLDER"


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _pad(data: bytes) -> bytes:
    return data + bytes(_padded(len(data)) - len(data))
