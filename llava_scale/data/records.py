"""The record of a sample: LLaVA's JSON to turns, and the rules that it must keep.

Writer and reader share these rules, so what packs also loads.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import orjson

from llava_scale.errors import SampleError
from llava_scale.types import PLACEHOLDERS, Clip, EncodedMedium, MediaKind, Role, Turn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llava_scale.types import Sample

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
FRAMES_EXT = "frames"
"""Extension under which a sample hands over a video stored as frames (see ``join_frames``)."""
FRAME_TIMES = "frame_times_s"
"""Field of the record: per video stored as frames, the time of each frame in seconds."""
VIDEO_AUDIO = "video_audio"
"""Field of the record: true makes the sound track of each video a sound of the sample, before its own sounds."""
VIDEO_CLIPS = "video_clips"
"""Field of the record: per video (and its sound track) the seconds ``[start, end]`` that are used; null for all."""
AUDIO_CLIPS = "audio_clips"
"""Field of the record: the same of the sample's own sounds."""


def load_record(data: bytes) -> dict[str, Any]:
    """Return the JSON object of a sample.

    Raises:
        SampleError: if there is none, or it is no JSON object in UTF-8.
    """
    if not data:
        raise SampleError("has no json member, or an empty one; add the conversation or remove the files")
    try:
        record = _parse(data)
    except ValueError as error:
        raise SampleError(f"its json cannot be read ({error}); write it again") from None
    if not isinstance(record, dict):
        raise SampleError(f"its json is a {type(record).__name__}; it must be an object with 'conversations'")
    return record


def _parse(data: bytes) -> Any:
    """Parse JSON; what ``orjson`` refuses (NaN, a byte order mark, halves of surrogate pairs) is left to ``json``."""
    try:
        return orjson.loads(data)
    except ValueError:
        return json.loads(data.decode("utf-8-sig"))


def parse_record(record: Mapping[str, Any], media_counts: Mapping[MediaKind, int]) -> tuple[Turn, ...]:
    """Return the conversation of a record whose sample has ``media_counts`` media of each kind.

    Media of a kind that the text never mentions are put before the first human turn, each on its own line
    (LLaVA's habit for captions). Sound tracks that the text never mentions follow their videos.

    Raises:
        SampleError: no conversation; a message that is no text or from nobody known; not in the order
            [system] human gpt human gpt ...; an empty answer; a placeholder outside of a human turn; placeholders
            and media that differ in number; clips that are none.
    """
    turns = _read_turns(record)
    _check_order(turns)
    clips_of(record, media_counts)
    if wants_sound_tracks(record):
        turns = _with_tracks(turns, media_counts)
    prefix = ""
    marked = [turn for turn in turns if "<" in turn.text]
    for kind, marker in PLACEHOLDERS.items():
        num_media = media_counts.get(kind, 0)
        num_markers = 0
        for role, text in marked:
            number = text.count(marker)
            if number and role != "user":
                raise SampleError(f"has {marker} in a turn of the {role}; media belong to human turns")
            num_markers += number
        if num_markers == num_media:
            continue
        if num_markers == 0:
            prefix += f"{marker}\n" * num_media
            continue
        remedy = f"add the missing {kind}" if num_markers > num_media else "mark every one"
        raise SampleError(
            f"has {_count(num_markers, marker + ' placeholder')} but {_count(num_media, kind)}; "
            f"{remedy} or remove the surplus"
        )
    if not prefix:
        return turns
    first = next(number for number, turn in enumerate(turns) if turn.role == "user")
    return (*turns[:first], Turn("user", prefix + turns[first].text), *turns[first + 1 :])


def wants_sound_tracks(record: Mapping[str, Any]) -> bool:
    """Whether the sound tracks of a record's videos are sounds of its sample.

    Raises:
        SampleError: the field that says so is neither true nor false.
    """
    wanted = record.get(VIDEO_AUDIO, False)
    if not isinstance(wanted, bool):
        raise SampleError(f"its {VIDEO_AUDIO!r} is {wanted!r}; it must be true or false")
    return wanted


def clips_of(
    record: Mapping[str, Any], media_counts: Mapping[MediaKind, int]
) -> dict[MediaKind, tuple[Clip | None, ...]]:
    """Which seconds of each video and sound are used; empty for a record that cuts no clips.

    Raises:
        SampleError: not one clip for each medium, or one that ends before it begins.
    """
    if VIDEO_CLIPS not in record and AUDIO_CLIPS not in record:
        return {}
    videos = _clips(record.get(VIDEO_CLIPS), media_counts.get("video", 0), VIDEO_CLIPS)
    tracks = videos if wants_sound_tracks(record) else ()
    own = _clips(record.get(AUDIO_CLIPS), media_counts.get("audio", 0) - len(tracks), AUDIO_CLIPS)
    return {"video": videos, "audio": (*tracks, *own)}


def encoded_media(sample: Sample) -> dict[MediaKind, tuple[EncodedMedium, ...]]:
    """The media of a sample with what its record says of them.

    Raises:
        SampleError: as ``clips_of``.
    """
    clips = clips_of(sample.extra, {kind: len(files) for kind, files in sample.media.items()})
    return {
        kind: tuple(
            EncodedMedium(
                data,
                times_s=_times_of(sample.extra, number) if ext == FRAMES_EXT else None,
                clip=clips[kind][number] if kind in clips else None,
            )
            for number, (ext, data) in enumerate(files)
        )
        for kind, files in sample.media.items()
    }


def fields_of(media: Mapping[MediaKind, Sequence[bytes | EncodedMedium]]) -> dict[str, Any]:
    """Fields of a record that say the same of its media; ``encoded_media`` reads them."""
    names: dict[MediaKind, str] = {"video": VIDEO_CLIPS, "audio": AUDIO_CLIPS}
    fields: dict[str, Any] = {}
    for kind, name in names.items():
        told = [item if isinstance(item, EncodedMedium) else EncodedMedium(item) for item in media.get(kind, ())]
        if any(item.clip for item in told):
            fields[name] = [item.clip and list(item.clip) for item in told]
        if any(item.times_s for item in told):
            fields[FRAME_TIMES] = [list(item.times_s or ()) for item in told]
    return fields


def _clips(value: object, number: int, name: str) -> tuple[Clip | None, ...]:
    if value is None:
        return (None,) * max(0, number)
    items = [value] if isinstance(value, list) and value and not isinstance(value[0], list | None) else value
    if not isinstance(items, list) or len(items) != number:
        raise SampleError(
            f"its {name!r} must be a list with [start, end] in seconds, or null, for each of its {max(0, number)} media"
        )
    return tuple(_clip(item, name) for item in items)


def _clip(item: object, name: str) -> Clip | None:
    if item is None:
        return None
    if isinstance(item, list) and len(item) == 2 and _is_time(item[0]):
        start_s, end_s = item
        if end_s is None or (_is_time(end_s) and end_s > start_s):
            return float(start_s), None if end_s is None else float(end_s)
    raise SampleError(f"its {name!r} holds {item!r}, which is no [start, end] in seconds (null for an open end)")


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _times_of(record: Mapping[str, Any], number: int) -> tuple[float, ...]:
    """Times of the stored frames of a video; none where the record does not tell them."""
    times = record.get(FRAME_TIMES)
    if not isinstance(times, list):
        return ()
    if times and not isinstance(times[0], list):
        return tuple(times) if number == 0 else ()
    return tuple(times[number]) if number < len(times) else ()


def _with_tracks(turns: tuple[Turn, ...], media_counts: Mapping[MediaKind, int]) -> tuple[Turn, ...]:
    """The turns with a place for each sound track, where they have none: right behind its video.

    Raises:
        SampleError: no video, or sounds that could be mistaken for tracks.
    """
    num_videos, num_sounds = media_counts.get("video", 0), media_counts.get("audio", 0)
    if not num_videos:
        raise SampleError(f"has {VIDEO_AUDIO!r} but no video; add one or remove the field")
    video, audio = PLACEHOLDERS["video"], PLACEHOLDERS["audio"]
    if any(audio in turn.text for turn in turns):
        return turns
    if num_sounds != num_videos:
        raise SampleError(
            f"has {_count(num_videos, 'video')} with {VIDEO_AUDIO!r} and {num_sounds} sounds in all, none with a "
            f"place in the text; mark every one with {audio}, sound tracks first"
        )
    if any(video in turn.text for turn in turns):
        return tuple(turn._replace(text=turn.text.replace(video, video + audio)) for turn in turns)
    first = next(number for number, turn in enumerate(turns) if turn.role == "user")
    marked = turns[first]._replace(text=f"{video}{audio}\n" * num_videos + turns[first].text)
    return (*turns[:first], marked, *turns[first + 1 :])


def text_length(turns: Sequence[Turn]) -> int:
    """Return the characters of a conversation, placeholders included."""
    return sum(len(turn.text) for turn in turns)


def join_frames(frames: Sequence[tuple[str, bytes]]) -> bytes:
    """Return the stored frames (extension, bytes) of one video as one string of bytes; ``split_frames`` undoes it."""
    header = json.dumps([[ext, len(data)] for ext, data in frames]).encode()
    return b"".join((len(header).to_bytes(4, "little"), header, *(data for _, data in frames)))


def split_frames(data: bytes) -> tuple[tuple[str, bytes], ...]:
    """Return the (extension, bytes) of every frame that ``join_frames`` put together, in order."""
    start = 4 + int.from_bytes(data[:4], "little")
    frames = []
    for ext, size in json.loads(data[4:start]):
        frames.append((str(ext), data[start : start + size]))
        start += size
    return tuple(frames)


def _read_turns(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise SampleError("has no conversation; 'conversations' must be a list of {'from', 'value'} messages")
    try:
        turns = tuple([Turn(_ROLES[message["from"]], message["value"]) for message in messages])
        "".join([turn.text for turn in turns]).encode()
    except (KeyError, TypeError, UnicodeEncodeError):
        for number, message in enumerate(messages, start=1):
            _check_message(message, number)
        raise
    return turns


def _check_message(message: object, number: int) -> None:
    """Raise what is wrong with a message, if anything is."""
    speaker = message.get("from") if isinstance(message, dict) else None
    text = message.get("value") if isinstance(message, dict) else None
    if not isinstance(speaker, str) or not isinstance(text, str):
        raise SampleError(f"message {number} is no {{'from', 'value'}} object with two texts")
    if speaker not in _ROLES:
        raise SampleError(f"message {number} is from {speaker!r}; known: {', '.join(_ROLES)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SampleError(f"message {number} holds half of a surrogate pair; write the text in UTF-8") from None


def _check_order(turns: tuple[Turn, ...]) -> None:
    spoken = turns[1:] if turns[0].role == "system" else turns
    if not spoken or spoken[0].role != "user":
        raise SampleError("the conversation must start with a human turn (a system turn may stand before it)")
    for number, turn in enumerate(spoken):
        expected: Role = "assistant" if number % 2 else "user"
        if turn.role != expected:
            raise SampleError(f"human and gpt must take turns, but turn {number + 1} is from the {turn.role}")
        if turn.role == "assistant" and not turn.text.strip():
            raise SampleError(f"answer {number // 2 + 1} is empty; write it or remove the question")
    if len(spoken) % 2:
        raise SampleError("the last human turn has no answer; add one or remove the turn")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 or noun == "audio" else f"{number} {noun}s"
