"""Make the index of a shard that has none: walk its tar headers, read its records, look at its media's headers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llava_scale.data.index import (
    NO_TEXT,
    IndexBuilder,
    MediaEntry,
    SampleEntry,
    ShardIndex,
    group_media,
    is_framed,
    media_order,
)
from llava_scale.data.names import NO_FRAME, RECORD_SUFFIX, parse_suffix, split_member, unescape_key
from llava_scale.data.records import (
    FRAME_TIMES,
    clips_of,
    load_record,
    parse_record,
    text_length,
    wants_sound_tracks,
)
from llava_scale.data.tarwalk import TarMember, walk_tar
from llava_scale.errors import SampleError, ShardError
from llava_scale.types import Clip, MediaInfo, MediaKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_HASH_BLOCK = 8 << 20


@dataclass(slots=True)
class _Group:
    """The members of one sample, as found."""

    record: TarMember | None = None
    media: list[MediaEntry] = field(default_factory=list)


def build_index(read: Callable[[int, int], bytes], size: int, *, name: str) -> ShardIndex:
    """Return the index of a shard, made from the tar alone.

    Samples stand in the order of their first member. Members of a sample need not be neighbours. Media whose header
    cannot be read are indexed with unknown sizes: reading their sample tells what is wrong.

    Args:
        read: ``read(offset, size)`` returns exactly those bytes.
        size: Bytes of the tar.
        name: File name of the shard.

    Raises:
        ShardError: if the tar is empty, damaged, truncated, or holds a member twice.
    """
    builder = IndexBuilder()
    for key, group in _group_members(walk_tar(read, size, shard=name), shard=name).items():
        media = sorted((_probed(entry, read) for entry in group.media), key=media_order)
        record = read(group.record.offset, group.record.size) if group.record else b""
        media, text_chars = describe(record, media, read)
        offset, json_size = (group.record.offset, group.record.size) if group.record else (0, 0)
        builder.add(SampleEntry(unescape_key(key), offset, json_size, tuple(media)), text_chars=text_chars)
    return builder.build(name, tar_bytes=size, tar_sha256=checksum(read, size))


def checksum(read: Callable[[int, int], bytes], size: int) -> str:
    """Return the SHA-256 of a shard, hexadecimal."""
    digest = hashlib.sha256()
    for start in range(0, size, _HASH_BLOCK):
        digest.update(read(start, min(_HASH_BLOCK, size - start)))
    return digest.hexdigest()


def count_media(media: Sequence[MediaEntry]) -> dict[MediaKind, int]:
    """Return how many media of each kind ordered entries stand for; a video's stored frames count as one."""
    counts: dict[MediaKind, int] = {}
    for entries in group_media(media) if is_framed(media) else ():
        counts[entries[0].kind] = counts.get(entries[0].kind, 0) + 1
    if not counts:
        for entry in media:
            counts[entry.kind] = counts.get(entry.kind, 0) + 1
    return counts


def describe(
    record: bytes, media: Sequence[MediaEntry], read: Callable[[int, int], bytes]
) -> tuple[list[MediaEntry], int]:
    """Return the media with what the record says of them, and the length of its text.

    That is: times of stored frames, sound tracks, clips. The length is ``NO_TEXT`` where the sample cannot be used.
    ``read(offset, size)`` returns bytes of the shard.
    """
    try:
        content = load_record(record)
        if wants_sound_tracks(content):
            media = _with_tracks(media, read)
        counts = count_media(media)
        length = text_length(parse_record(content, counts))
    except SampleError:
        return list(media), NO_TEXT
    for kind, clips in clips_of(content, counts).items():
        media = [_cut(entry, clips[entry.number], read) if entry.kind == kind else entry for entry in media]
    times = content.get(FRAME_TIMES)
    if isinstance(times, list):
        media = [_timed(entry, times) for entry in media]
    return list(media), length


def probe_media(kind: MediaKind, ext: str, data: bytes, clip: Clip | None = None) -> MediaInfo:
    """Return what the header of a medium says, of a clip what the packets say.

    Raises:
        SampleError: if the header cannot be read, or the clip lies behind the end.
    """
    from llava_scale.data.media import probe

    if kind == "audio":
        return probe("wav", data, clip)  # any extension of a sound: a video's track counts, not its pictures
    info = probe(ext, data, clip)
    return info if info.kind == kind else replace(info, kind=kind)


def _with_tracks(media: Sequence[MediaEntry], read: Callable[[int, int], bytes]) -> list[MediaEntry]:
    """The media and, before their own sounds, the sound track of each video file; it shares the video's bytes.

    Videos stored as frames have none: packing has stored it as a sound already.
    """
    videos = [entry for entry in media if entry.kind == "video" and entry.frame == NO_FRAME]
    tracks = [
        _probed(entry._replace(kind="audio", number=number, info=MediaInfo(kind="audio")), read)
        for number, entry in enumerate(videos)
    ]
    own = [entry for entry in media if entry.kind == "audio"]
    sounds = [entry._replace(number=number) for number, entry in enumerate([*tracks, *own])]
    return [*(entry for entry in media if entry.kind != "audio"), *sounds]


def _group_members(members: Iterable[TarMember], *, shard: str) -> dict[str, _Group]:
    groups: dict[str, _Group] = {}
    names: set[tuple[str, str]] = set()
    for member in members:
        parts = split_member(member.name)
        if parts is None:
            continue
        key, suffix = parts
        medium = parse_suffix(suffix)
        if medium is None and suffix != RECORD_SUFFIX:
            continue
        if parts in names:
            raise ShardError(
                f"{shard}: holds {key!r}.{suffix} twice; keys must be unique, give one of them another name"
            )
        names.add(parts)
        group = groups.setdefault(key, _Group())
        if medium is None:
            group.record = member
        else:
            info = MediaInfo(kind=medium.kind)
            group.media.append(MediaEntry(*medium[:4], member.offset, member.size, info))
    return groups


def _cut(entry: MediaEntry, clip: Clip | None, read: Callable[[int, int], bytes]) -> MediaEntry:
    """The entry of a file of which only a clip is used."""
    if clip is None or entry.frame != NO_FRAME:
        return entry
    return _probed(entry._replace(info=MediaInfo(kind=entry.kind)), read, clip)


def _probed(entry: MediaEntry, read: Callable[[int, int], bytes], clip: Clip | None = None) -> MediaEntry:
    try:
        info = replace(probe_media(entry.kind, entry.ext, read(entry.offset, entry.size), clip), clip=None)
    except SampleError:
        return entry
    return entry._replace(info=info)


def _timed(entry: MediaEntry, times: list[object]) -> MediaEntry:
    if entry.frame == NO_FRAME or entry.number >= len(times):
        return entry
    of_video = times[entry.number]
    if not isinstance(of_video, list) or not of_video or not isinstance(of_video[-1], int | float):
        return entry
    return entry._replace(info=replace(entry.info, duration_s=max(0.0, float(of_video[-1]))))
