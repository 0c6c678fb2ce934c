"""A conversation with a model: its history, the pictures waiting for the next question, streamed answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llava_scale.data.media import decode_image
from llava_scale.errors import SampleError
from llava_scale.serving.prompts import GenerationRequest, place_media
from llava_scale.types import MediaKind, Turn

if TYPE_CHECKING:
    from llava_scale.serving.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """How answers are written; the meaning is that of ``Engine.generate``."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(slots=True)
class ChatSession:
    """One conversation.

    Attributes:
        engine: Who answers.
        settings: How answers are written.
        turns: Finished questions and answers.
        media: Their media, per kind in the order of the placeholders.
        waiting: Media that go with the next question.
    """

    engine: Engine
    settings: AnswerSettings = field(default_factory=AnswerSettings)
    turns: tuple[Turn, ...] = ()
    media: dict[MediaKind, tuple[bytes, ...]] = field(default_factory=dict)
    waiting: dict[MediaKind, tuple[bytes, ...]] = field(default_factory=dict)

    def add_image(self, path: str | Path) -> tuple[int, int]:
        """Keep a picture for the next question and return its width and height.

        Raises:
            SampleError: it cannot be read or is no picture; nothing is kept then.
        """
        file = Path(path).expanduser()
        try:
            data = file.read_bytes()
            pixels = decode_image(data, max_pixels=self.engine.processor.image_transform.max_pixels)
        except OSError as error:
            raise SampleError(f"cannot read {file}: {error.strerror}") from None
        except SampleError as error:
            raise SampleError(f"{file}: {error.reason}") from None
        self.waiting["image"] = (*self.waiting.get("image", ()), data)
        return pixels.shape[2], pixels.shape[1]

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer in pieces; what was written of it becomes history, also if it is stopped on the way.

        Waiting pictures go in front of the question, or where its placeholders stand. If nothing was written, the
        conversation and the waiting pictures stay as they were.

        Raises:
            SampleError: the question cannot be asked (see ``Engine.stream``).
        """
        counts = {kind: len(items) for kind, items in self.waiting.items()}
        (question,) = place_media((Turn("user", text),), counts)
        turns = (*self.turns, question)
        media = {
            kind: (*self.media.get(kind, ()), *self.waiting.get(kind, ())) for kind in {**self.media, **self.waiting}
        }
        request = GenerationRequest(turns=turns, media=media)
        written = ""
        try:
            pieces = self.engine.stream(
                request,
                max_new_tokens=self.settings.max_new_tokens,
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                seed=self.settings.seed,
            )
            with closing(pieces):
                for piece in pieces:
                    written += piece
                    yield piece
        finally:
            if written.strip():
                self.turns = (*turns, Turn("assistant", written.strip()))
                self.media, self.waiting = media, {}

    def clear(self) -> None:
        """Forget the conversation and the waiting pictures."""
        self.turns, self.media, self.waiting = (), {}, {}
