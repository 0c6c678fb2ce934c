"""Samples as questions: every answer of a conversation is one, asked after the true history."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from PIL import Image

from llava_scale.data.records import encoded_media
from llava_scale.errors import SampleError
from llava_scale.types import MEDIA_KINDS, PLACEHOLDERS, EncodedMedium, MediaKind, Turn

if TYPE_CHECKING:
    from llava_scale.types import Sample

MODALITIES = ("text", "image", "video", "audio", "video_audio")
"""Groups of questions, in the order of tables; other mixtures of media count under the last of their kinds."""

_PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One answer that is asked for.

    Attributes:
        number: Number of the sample in its data set.
        key: Key of the sample.
        turns: What stands before the answer, with the true answers of earlier turns.
        media: Encoded media of these turns, per kind in order; clips and stored frames with what the record says.
        gold: The true answer.
        task: The sample's ``task`` field, or empty.
        change: What is done to the media before the model gets them: ``blank`` or ``shuffle`` (the frames of videos).
    """

    number: int
    key: str
    turns: tuple[Turn, ...]
    media: Mapping[MediaKind, tuple[bytes | EncodedMedium, ...]] = field(default_factory=dict)
    gold: str
    task: str = ""
    change: Literal["", "blank", "shuffle"] = ""

    @property
    def text(self) -> str:
        """The question itself, without history and placeholders."""
        return _PLACEHOLDER.sub("", self.turns[-1].text).strip()

    @property
    def modality(self) -> str:
        """``text``, ``image`` (one or several), ``video``, ``audio`` or ``video_audio``."""
        if self.media.get("video") and self.media.get("audio"):
            return "video_audio"
        present = [kind for kind in MEDIA_KINDS if self.media.get(kind)]
        return present[-1] if present else "text"


Generate = Callable[[Sequence[Question]], Sequence["str | SampleError"]]
"""Answers to questions, in their order; an error for one that the model cannot take."""


def questions_of(sample: Sample, number: int) -> list[Question]:
    """Return a question for every answer in a sample."""
    task = sample.extra.get("task")
    questions = []
    encoded = encoded_media(sample)
    for place, turn in enumerate(sample.turns):
        if turn.role != "assistant":
            continue
        before = sample.turns[:place]
        media: dict[MediaKind, tuple[bytes | EncodedMedium, ...]] = {}
        for kind, items in encoded.items():
            num_mentioned = sum(earlier.text.count(PLACEHOLDERS[kind]) for earlier in before)
            media[kind] = tuple(_plain(item) for item in items[:num_mentioned])
        questions.append(
            Question(
                number=number,
                key=sample.key,
                turns=before,
                media={kind: shown for kind, shown in media.items() if shown},
                gold=turn.text,
                task=task if isinstance(task, str) else "",
            )
        )
    return questions


def _plain(medium: EncodedMedium) -> bytes | EncodedMedium:
    return medium.data if medium == EncodedMedium(medium.data) else medium


class BlindGenerate:
    """Asks with pictures and frames of one colour and silent sounds, so that only the text can help.

    Questions about pictures that are then the same are asked once.

    Args:
        generate: Who answers.
        colour: Red, green, blue of the plain picture, 0 to 255.
        size: Its side in pixels.
    """

    def __init__(self, generate: Generate, *, colour: tuple[int, int, int], size: int) -> None:
        self._generate = generate
        buffer = io.BytesIO()
        Image.new("RGB", (size, size), colour).save(buffer, format="PNG")
        self._plain = buffer.getvalue()
        self._known: dict[tuple[tuple[Turn, ...], int, int], str | SampleError] = {}

    def __call__(self, questions: Sequence[Question]) -> list[str | SampleError]:
        """Answers in the order of the questions."""
        keys = [self._key(question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._known}
        answers = self._generate([self._blinded(question) for question in new.values()]) if new else ()
        self._known.update(zip(new, answers, strict=True))
        return [self._known[key] for key in keys]

    def _key(self, question: Question) -> tuple[tuple[Turn, ...], int, int]:
        only_pictures = question.modality in ("text", "image")  # other media differ in length
        return question.turns, len(question.media.get("image", ())), -1 if only_pictures else question.number

    def _blinded(self, question: Question) -> Question:
        if question.modality not in ("text", "image"):
            return replace(question, change="blank")
        plain = (self._plain,) * len(question.media.get("image", ()))
        return replace(question, media={"image": plain} if plain else {})
