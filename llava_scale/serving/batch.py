"""A file of questions in, a file of answers out: batched, and continued where it was cut off.

Input, one JSON object a line: ``question`` or ``conversations`` (ending with the user), ``image``, ``video`` and
``audio`` (a path or a list of them), ``video_audio`` (true: videos are heard too), ``video_clips`` and ``audio_clips``
(their seconds that are used, as in data) and, if wanted, ``id``. Output, one JSON object a line, in the order of the
input: ``line`` (from 1), the fields of the question, ``model``, and ``answer`` or ``error``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_scale.data.records import AUDIO_CLIPS, VIDEO_AUDIO, VIDEO_CLIPS, clips_of, wants_sound_tracks
from llava_scale.errors import ConfigError, SampleError
from llava_scale.serving.prompts import CutMedium, GenerationRequest, Medium
from llava_scale.types import MEDIA_KINDS, MediaKind, Turn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llava_scale.serving.engine import Engine

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_FIELDS = ("id", "image", "video", "audio", VIDEO_AUDIO, VIDEO_CLIPS, AUDIO_CLIPS, "question", "conversations")
_BATCHES_AT_ONCE = 16  # lines share one running batch within these, and are written out after them


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """What became of the lines.

    Attributes:
        num_lines: Lines of the input that are not blank.
        num_kept: Answered by an earlier run.
        num_answered: Answered by this one.
        errors: (line, reason) of those that could not be answered.
    """

    num_lines: int
    num_kept: int
    num_answered: int
    errors: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    record: dict[str, Any]
    problem: str = ""


def answer_file(
    engine: Engine,
    source: Path,
    target: Path,
    *,
    model_name: str,
    media_root: Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunOutcome:
    """Answer every line of ``source`` into ``target``; lines that ``target`` already answers are kept.

    Killed at any time, the next call goes on: at most the last few batches are answered again, a half-written line is
    dropped, and lines with errors are tried again.

    Args:
        engine: Who answers.
        source: JSON lines with the questions.
        target: JSON lines with the answers; made if missing.
        model_name: Noted in each line, so that the answers of two models never mix.
        media_root: Folder that picture paths are relative to; the folder of ``source`` if None.
        batch_size: Most questions in one batch.
        max_new_tokens: Longest answer in tokens.
        on_progress: Called with the lines done and the lines in all.

    Raises:
        ConfigError: a file cannot be read or written, or ``target`` holds answers to something else.
    """
    lines = _read_lines(source)
    done = _kept_answers(target, lines, model_name)
    num_kept = len(done)
    in_order = list(done) == sorted(done)
    waiting = iter([line for line in lines if line.number not in done])
    root = media_root or source.parent
    last = max(done, default=0)
    on_progress(len(done), len(lines))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as out:
            while group := list(islice(waiting, batch_size * _BATCHES_AT_ONCE)):
                answers = _answer(engine, group, root, batch_size, max_new_tokens)
                written = [_output(line, answer, model_name) for line, answer in zip(group, answers, strict=True)]
                in_order = in_order and last < group[0].number
                last = group[-1].number
                done.update((line.number, text) for line, text in zip(group, written, strict=True))
                out.write("".join(written).encode())
                out.flush()
                os.fsync(out.fileno())
                on_progress(len(done), len(lines))
        if not in_order:
            _replace(target, [done[number] for number in sorted(done)])
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; choose another place") from None
    failed = [(number, json.loads(text).get("error")) for number, text in sorted(done.items())]
    errors = tuple((number, reason) for number, reason in failed if reason is not None)
    return RunOutcome(
        num_lines=len(lines), num_kept=num_kept, num_answered=len(done) - num_kept - len(errors), errors=errors
    )


def read_request(record: dict[str, Any], media_root: Path) -> GenerationRequest:
    """Return the request that a line asks for.

    Raises:
        SampleError: a field is missing, doubled or of the wrong type.
    """
    if ("question" in record) == ("conversations" in record):
        raise SampleError("give exactly one of 'question' and 'conversations'")
    if "question" in record:
        if not isinstance(record["question"], str) or not record["question"].strip():
            raise SampleError("'question' must be a text that is not empty")
        turns: tuple[Turn, ...] = (Turn("user", record["question"]),)
    else:
        turns = tuple(_turns(record["conversations"]))
    heard = wants_sound_tracks(record)
    return GenerationRequest(turns=turns, media=_media(record, media_root), video_audio=heard)


def _media(record: dict[str, Any], media_root: Path) -> dict[MediaKind, Sequence[Medium]]:
    paths = {kind: _paths(record, kind, media_root) for kind in MEDIA_KINDS}
    own = {**record, VIDEO_AUDIO: False}  # sound tracks are cut like their videos
    clips = clips_of(own, {kind: len(of_kind) for kind, of_kind in paths.items()})
    media: dict[MediaKind, Sequence[Medium]] = {**paths}
    for kind, of_kind in clips.items():
        pairs = zip(paths[kind], of_kind, strict=True)
        media[kind] = [path if clip is None else CutMedium(path, clip) for path, clip in pairs]
    return media


def _paths(record: dict[str, Any], kind: MediaKind, media_root: Path) -> list[Path]:
    paths = record.get(kind, [])
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise SampleError(f"{kind!r} must be a path or a list of paths")
    return [media_root / path for path in paths]


def _turns(messages: Any) -> Iterator[Turn]:
    if not isinstance(messages, list) or not messages:
        raise SampleError("'conversations' must be a list of {'from', 'value'} messages")
    for message in messages:
        role = _ROLES.get(str(message.get("from"))) if isinstance(message, dict) else None
        if role is None or not isinstance(message.get("value"), str):
            raise SampleError("each message of 'conversations' must be {'from': 'human' or 'gpt', 'value': text}")
        yield Turn(role, message["value"])  # type: ignore[arg-type]


def _read_lines(source: Path) -> list[_Line]:
    try:
        texts = source.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read {source}: {reason}") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            lines.append(_Line(number, {}, f"is not JSON: {error}"))
            continue
        is_object = isinstance(record, dict)
        lines.append(_Line(number, record if is_object else {}, "" if is_object else "must be a JSON object"))
    return lines


def _kept_answers(target: Path, lines: Sequence[_Line], model_name: str) -> dict[int, str]:
    """Lines of ``target`` that answer lines of the input; the file is cut behind its last whole line."""
    try:
        content = target.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read {target}: {error.strerror}") from None
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(target, len(whole))
    asked = {line.number: line for line in lines}
    kept: dict[int, str] = {}
    has_errors = False
    for text in whole.decode(errors="replace").splitlines():
        written = _parse_output(text, target)
        line = asked.get(written["line"])
        shown = {name: written[name] for name in _FIELDS if name in written}
        if line is None or shown != _shown(line) or written.get("model") != model_name:
            raise ConfigError(
                f"{target}: its line for input line {written['line']} answers another question or comes from another "
                "model; choose another file, or start over with --overwrite"
            )
        if "answer" in written:
            kept[line.number] = text + "\n"
        else:
            has_errors = True
    if has_errors:
        _replace(target, list(kept.values()))
    return kept


def _parse_output(text: str, target: Path) -> dict[str, Any]:
    try:
        written = json.loads(text)
        if isinstance(written, dict) and isinstance(written["line"], int):
            return written
    except (ValueError, KeyError):
        pass
    raise ConfigError(f"{target} holds lines that are no answers; choose another file, or start over with --overwrite")


def _answer(
    engine: Engine, group: Sequence[_Line], root: Path, batch_size: int, max_new_tokens: int
) -> list[str | SampleError]:
    answers: list[str | SampleError] = []
    requests: list[GenerationRequest] = []
    places: list[int] = []
    for place, line in enumerate(group):
        answers.append(SampleError(line.problem))
        if line.problem:
            continue
        try:
            requests.append(read_request(line.record, root))
            places.append(place)
        except SampleError as error:
            answers[place] = error
    outcomes = engine.try_generate(requests, max_new_tokens=max_new_tokens, batch_size=batch_size)
    for place, outcome in zip(places, outcomes, strict=True):
        answers[place] = outcome
    return answers


def _shown(line: _Line) -> dict[str, Any]:
    return {name: line.record[name] for name in _FIELDS if name in line.record}


def _output(line: _Line, answer: str | SampleError, model_name: str) -> str:
    result = {"error": str(answer)} if isinstance(answer, SampleError) else {"answer": answer}
    return json.dumps({"line": line.number, **_shown(line), "model": model_name, **result}, ensure_ascii=False) + "\n"


def _replace(target: Path, texts: Sequence[str]) -> None:
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("wb") as out:
        out.write("".join(texts).encode())
        out.flush()
        os.fsync(out.fileno())
    partial.replace(target)
