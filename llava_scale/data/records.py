"""The record of a sample: LLaVA's JSON to turns, and the rules that it must keep.

Writer and reader share these rules, so what packs also loads.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import orjson

from llava_scale.errors import SampleError
from llava_scale.types import PLACEHOLDERS, MediaKind, Role, Turn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
            and media that differ in number.
    """
    turns = _read_turns(record)
    _check_order(turns)
    if record.get(VIDEO_AUDIO):
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
