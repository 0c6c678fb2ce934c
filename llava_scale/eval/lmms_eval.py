"""What lmms-eval asks, as questions to our models: messages with media, or a text with media before it.

The command line joins this with a way to answer (``cli.lmms_eval``) and registers it with lmms-eval.
"""

from __future__ import annotations

import io
import logging
import re
import wave
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_scale.errors import ConfigError, SampleError
from llava_scale.eval.choosing import Chooser
from llava_scale.eval.task_data import TaskItem
from llava_scale.eval.tasks import Generate, Question
from llava_scale.types import MEDIA_KINDS, PLACEHOLDERS, MediaKind, Role, Turn

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128
"""Of tasks that do not say."""

_EXTENSIONS: dict[MediaKind, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp", "bmp", "gif"),
    "video": ("mp4", "webm", "mkv", "mov", "avi"),
    "audio": ("mp3", "wav", "flac", "ogg", "m4a"),
}
_PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))
_ROLES: tuple[Role, ...] = ("system", "user", "assistant")

Files = dict[MediaKind, tuple[tuple[str, bytes], ...]]


class Answering:
    """Answers requests of lmms-eval.

    Args:
        generate: Called with the longest answer in tokens; returns how questions are answered.
        choose: Scores choices.
        docs: Task, split and number to the document; lmms-eval's ``task_dict``.
    """

    def __init__(self, generate: Callable[[int], Generate], choose: Chooser, docs: Mapping[str, Any]) -> None:
        self._generate, self._choose, self._docs = generate, choose, docs

    def generate_until(self, requests: Sequence[Any], *, chat: bool) -> list[str]:
        """Answers to ``generate_until`` requests in their order; empty, with a warning, for what cannot be asked."""
        answers = [""] * len(requests)
        asked: dict[int, list[tuple[int, Question, list[str]]]] = {}
        for place, request in enumerate(requests):
            settings = request.args[2] if chat else request.args[1]
            try:
                question = self._question(request, chat=chat)
            except SampleError as error:
                logger.warning("%s cannot be asked: %s", request.args[-2:], error)
                continue
            longest, until = _settings(settings)
            asked.setdefault(longest, []).append((place, question, until))
        for longest, group in asked.items():
            found = self._generate(longest)([question for _, question, _ in group])
            for (place, question, until), answer in zip(group, found, strict=True):
                if isinstance(answer, SampleError):
                    logger.warning("%s cannot be answered: %s", question.key, answer)
                else:
                    answers[place] = _cut(answer, until)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Loss of each continuation, its end marker included, in nats a token, and whether it is what would be written.

        lmms-eval takes losses here, the smallest of which wins, whatever the name says.
        Continuations of one document are scored together; whether one is the greedy answer is looked at only where a
        document has just one, since scores of several choices do not use it.
        """
        results: list[tuple[float, bool]] = []
        for _, group in groupby(requests, key=lambda request: (request.args[3:], request.args[0])):
            members = list(group)
            question, files = self._with_media(members[0])
            texts = tuple(self._continuation(request) for request in members)
            item = TaskItem(
                number=0, place=0, key=question.key, question=question, references=("",), choices=texts, files=files
            )
            response = self._choose(item)
            greedy = False
            if len(members) == 1:
                answer = self._generate(MAX_NEW_TOKENS)([question])[0]
                greedy = answer == texts[0]
            losses = [-score / length for score, length in zip(response.scores, response.lengths, strict=True)]
            results += [(loss, greedy) for loss in losses]
        return results

    def _question(self, request: Any, *, chat: bool) -> Question:
        if not chat:
            return self._with_media(request)[0]
        _, to_messages, _, number, task, split = request.args
        return question_of_messages(to_messages(self._docs[task][split][number]), key=f"{task}/{split}/{number}")

    def _with_media(self, request: Any) -> tuple[Question, Files]:
        """Question of a simple request: media first, then the text."""
        text, _, to_visual, number, task, split = request.args
        found = to_visual(self._docs[task][split][number]) if to_visual is not None else []
        files = _by_kind(_flat(found))
        counts = {kind: len(items) for kind, items in files.items()}
        marked = {kind: text.count(PLACEHOLDERS[kind]) for kind in MEDIA_KINDS}
        if any(marked[kind] != counts.get(kind, 0) for kind in MEDIA_KINDS):
            text = _PLACEHOLDER.sub("", text).lstrip("\n")
            marks = [PLACEHOLDERS[kind] for kind in MEDIA_KINDS for _ in range(counts.get(kind, 0))]
            text = "".join(f"{mark}\n" for mark in marks) + text
        return _question((Turn("user", text),), files, key=f"{task}/{split}/{number}"), files

    def _continuation(self, request: Any) -> str:
        _, continuation, _, number, task, split = request.args
        text = continuation(self._docs[task][split][number]) if callable(continuation) else continuation
        return str(text).strip()


def question_of_messages(messages: Sequence[Mapping[str, Any]], *, key: str) -> Question:
    """The question that chat messages ask, each content a text or a list of parts (``text``, ``image``, ...).

    Raises:
        SampleError: an unknown role or part, or a medium that cannot be read.
    """
    turns: list[Turn] = []
    media: list[tuple[MediaKind, str, bytes]] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text, after_medium = "", False
        for part in parts:
            kind = part["type"]
            if kind == "text":
                text += ("\n" if after_medium and not part["text"].startswith("\n") else "") + part["text"]
            elif kind in PLACEHOLDERS:
                text += PLACEHOLDERS[kind]
                media.append((kind, *_encoded(kind, part.get("url", part.get(kind)))))
            else:
                raise SampleError(f"{key}: parts of type {kind!r} are not known")
            after_medium = kind != "text"
        if message["role"] not in _ROLES:
            raise SampleError(f"{key}: the role {message['role']!r} is not known")
        turns.append(Turn(message["role"], text))
    files: Files = {}
    for kind, ext, data in media:
        files[kind] = (*files.get(kind, ()), (ext, data))
    return _question(tuple(turns), files, key=key)


def _question(turns: tuple[Turn, ...], files: Files, *, key: str) -> Question:
    media = {kind: tuple(data for _, data in items) for kind, items in files.items()}
    return Question(number=0, key=key, turns=turns, media=media, gold="")


def _settings(fields: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Longest answer, and texts that end one; drawing is not offered."""
    if fields.get("do_sample") and float(fields.get("temperature") or 0) > 0:
        logger.warning("the task asks for drawn answers; ours always take the likeliest token")
    until = fields.get("until") or []
    return int(fields.get("max_new_tokens") or MAX_NEW_TOKENS), [until] if isinstance(until, str) else list(until)


def _cut(answer: str, until: Sequence[str]) -> str:
    for text in until:
        if text.strip():
            answer = answer.split(text)[0]
    return answer.strip()


def _flat(found: Any) -> Iterable[Any]:
    if isinstance(found, list | tuple):
        for item in found:
            yield from _flat(item)
    elif found is not None:
        yield found


def _by_kind(found: Iterable[Any]) -> Files:
    files: Files = {}
    for medium in found:
        kind = _kind_of(medium)
        files[kind] = (*files.get(kind, ()), _encoded(kind, medium))
    return files


def _kind_of(medium: Any) -> MediaKind:
    if isinstance(medium, Image.Image):
        return "image"
    if isinstance(medium, Mapping) and "array" in medium:
        return "audio"
    if isinstance(medium, str | Path):
        ext = Path(medium).suffix.lstrip(".").lower()
        for kind, known in _EXTENSIONS.items():
            if ext in known:
                return kind
    raise SampleError(f"a medium of type {type(medium).__name__} ({str(medium)[:80]}) is not known")


def _encoded(kind: MediaKind, medium: Any) -> tuple[str, bytes]:
    """Extension and bytes of a medium: a local path, a Pillow picture, or sound as an array."""
    if isinstance(medium, Image.Image):
        buffer = io.BytesIO()
        medium.convert("RGB").save(buffer, format="PNG")
        return "png", buffer.getvalue()
    if isinstance(medium, Mapping) and "array" in medium:
        return "wav", _wav(np.asarray(medium["array"], dtype=np.float32), int(medium["sampling_rate"]))
    if isinstance(medium, str | Path):
        try:
            return Path(medium).suffix.lstrip(".").lower(), Path(medium).read_bytes()
        except OSError as error:
            raise SampleError(f"cannot read {medium}: {error.strerror}") from None
    raise SampleError(f"{kind} as {type(medium).__name__} is not known; give a path, a picture or an array of sound")


def _wav(samples: np.ndarray[Any, Any], rate: int) -> bytes:
    """Sound in [-1, 1], ``(N,)`` or ``(channels, N)``, as 16-bit WAV of one channel."""
    mono = samples if samples.ndim == 1 else samples.mean(0)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((mono.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return buffer.getvalue()


def check_arguments(unknown: Mapping[str, Any]) -> None:
    """Refuse model arguments that nobody reads.

    Raises:
        ConfigError: there are any.
    """
    named = [name for name in unknown if name not in ("max_batch_size",)]
    if named:
        raise ConfigError(
            f"--model_args of llava_scale: unknown {', '.join(named)}; known: pretrained, device, dtype, batch_size"
        )
