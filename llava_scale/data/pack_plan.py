"""From LLaVA JSON to a plan of shards: every record checked as far as it goes without opening its media."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_scale.data.names import EXTENSIONS
from llava_scale.data.records import parse_record, wants_sound_tracks
from llava_scale.errors import SampleError, ShardError
from llava_scale.types import MEDIA_KINDS, MediaKind

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that was left out.

    Attributes:
        record: Its number in the input from 1 (the line number of a JSONL file).
        id: Its id, "" if it has none.
        reason: What is wrong.
    """

    record: int
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A medium of a sample that is to be packed: ``path`` is relative to the media root."""

    kind: MediaKind
    ext: str
    path: str


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A record that keeps the rules; whether its media can be read is not known yet."""

    number: int
    key: str
    record: dict[str, Any]
    files: tuple[PlannedFile, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be packed, in order, and what is not."""

    samples: tuple[PlannedSample, ...]
    bad: tuple[BadRecord, ...]
    fingerprint: str
    """SHA-256 of the input file."""


def make_plan(source: Path, media_root: Path) -> Plan:
    """Read LLaVA JSON (a list) or JSONL and check every record.

    Args:
        source: Objects with ``id``, ``conversations`` and optionally ``image``, ``video``, ``audio``: one path or a
            list of paths, relative to ``media_root``.
        media_root: Folder that all media must lie in.

    Raises:
        ShardError: if the file cannot be read at all.
    """
    try:
        data = source.read_bytes()
    except OSError as error:
        raise ShardError(f"{source}: {error.strerror}; give a LLaVA JSON or JSONL file") from None
    samples: list[PlannedSample] = []
    bad: list[BadRecord] = []
    first_of: dict[str, int] = {}
    for number, record in _records(data, source):
        key = _key(record)
        try:
            sample = _check(number, record, media_root)
            first = first_of.setdefault(sample.key, number)
            if first != number:
                raise SampleError(f"its id is that of record {first}; ids must be unique")
        except SampleError as error:
            bad.append(BadRecord(number, key, error.reason))
        else:
            samples.append(sample)
    return Plan(tuple(samples), tuple(bad), hashlib.sha256(data).hexdigest())


def _records(data: bytes, source: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, record); a record that is no JSON comes as the error that says so."""
    text = data.removeprefix(b"\xef\xbb\xbf")
    if text.lstrip()[:1] == b"[":
        try:
            records = json.loads(text)
        except ValueError as error:
            raise ShardError(
                f"{source}: is no JSON list ({error}); mend it, or write one object a line (JSONL)"
            ) from None
        yield from enumerate(records, start=1)
        return
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            yield number, error


def _key(record: Any) -> str:
    """Return the id of a record, "" where it has none; numbers are taken as text."""
    value = record.get("id") if isinstance(record, dict) else None
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _check(number: int, record: Any, media_root: Path) -> PlannedSample:
    if isinstance(record, ValueError):
        raise SampleError(f"is not JSON ({record})")
    if not isinstance(record, dict):
        raise SampleError(f"is a JSON {type(record).__name__}, not an object")
    key = _key(record)
    if not key:
        raise SampleError("has no id; give every record an 'id' (text or number)")
    files = tuple(file for kind in MEDIA_KINDS for file in _files(record, kind, media_root))
    counts: dict[MediaKind, int] = {kind: sum(file.kind == kind for file in files) for kind in MEDIA_KINDS}
    if wants_sound_tracks(record):
        counts["audio"] += counts["video"]
    parse_record(record, counts)
    return PlannedSample(number, key, {**record, "id": key}, files)


def _files(record: dict[str, Any], kind: MediaKind, media_root: Path) -> Iterator[PlannedFile]:
    value = record.get(kind)
    names = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise SampleError(f"its '{kind}' must be a path or a list of paths, found {name!r}")
        ext = os.path.splitext(name)[1].removeprefix(".").lower()  # noqa: PTH122 - faster than Path on millions
        if EXTENSIONS.get(ext) != kind:
            known = ", ".join(known for known, of in EXTENSIONS.items() if of == kind)
            raise SampleError(f"{kind} {name!r}: unknown extension {ext!r}; known: {known}")
        yield PlannedFile(kind, ext, _inside(name, kind, media_root))


def _inside(name: str, kind: MediaKind, media_root: Path) -> str:
    """Return a path relative to the media root; links are followed as they are, ``..`` may not lead out."""
    root = os.path.normpath(media_root)
    relative = os.path.relpath(os.path.normpath(os.path.join(root, name)), root)  # noqa: PTH118
    if relative == os.pardir or relative.startswith(os.pardir + os.sep) or "\0" in name:
        raise SampleError(f"{kind} {name!r} lies outside of the media root {media_root}")
    return relative
