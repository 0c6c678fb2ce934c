"""A conversation with a model: its history, the media waiting for the next question, streamed answers."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llava_scale.data.media import decode_image, probe
from llava_scale.data.records import VIDEO_AUDIO
from llava_scale.errors import ConfigError, SampleError
from llava_scale.serving.prompts import PROBED_AS, GenerationRequest, place_media
from llava_scale.serving.sampling import Sampling
from llava_scale.serving.streaming import text_pieces
from llava_scale.types import MEDIA_KINDS, MediaInfo, MediaKind, Turn

if TYPE_CHECKING:
    from llava_scale.serving.decoding import Answer, Kept
    from llava_scale.serving.engine import Engine

_NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """How answers are written; the meaning is that of ``Engine.generate``."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A medium of the conversation: its file's content, and where it lies."""

    data: bytes
    path: str


Attachments = dict[MediaKind, tuple[Attachment, ...]]


@dataclass(slots=True)
class ChatSession:
    """One conversation. Keys and values are kept between turns, so only what is new is read.

    Attributes:
        engine: Who answers.
        settings: How answers are written.
        turns: Finished questions and answers.
        media: Their media, per kind in the order of the placeholders.
        waiting: Media that go with the next question.
        last: The last answer with its counts, finished or stopped.
        video_audio: Whether videos are heard too.
    """

    engine: Engine
    settings: AnswerSettings = field(default_factory=AnswerSettings)
    turns: tuple[Turn, ...] = ()
    media: Attachments = field(default_factory=dict)
    waiting: Attachments = field(default_factory=dict)
    last: Answer | None = None
    video_audio: bool = False
    _kept: Kept | None = None

    def add(self, kind: MediaKind, path: str | Path) -> MediaInfo:
        """Keep a medium for the next question and return what is known of it.

        Raises:
            SampleError: it cannot be read, or the model takes no such media; nothing is kept then.
        """
        file = Path(path).expanduser()
        try:
            data = file.read_bytes()
            info = probe(PROBED_AS[kind], data)
            self.engine.processor.token_counter.count(info, step=None)
            if kind == "image":
                decode_image(data, max_pixels=self.engine.processor.image_transform.max_pixels)
        except OSError as error:
            raise SampleError(f"cannot read {file}: {error.strerror}") from None
        except SampleError as error:
            raise SampleError(f"{file}: {error.reason}") from None
        self.waiting[kind] = (*self.waiting.get(kind, ()), Attachment(data, str(file)))
        return info

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yield the answer in pieces; what was written of it becomes history, also if it is stopped on the way.

        Waiting media go in front of the question, or where its placeholders stand. If nothing was written, the
        conversation and the waiting media stay as they were.

        Raises:
            SampleError: the question cannot be asked (see ``Engine.stream``).
        """
        waiting = dict(self.waiting)
        hears_videos = self.video_audio and bool(waiting.get("video"))
        if hears_videos:
            waiting["audio"] = (*waiting["video"], *waiting.get("audio", ()))
        counts = {kind: len(items) for kind, items in waiting.items()}
        (question,) = place_media((Turn("user", text),), counts, video_audio=hears_videos)
        turns = (*self.turns, question)
        media: Attachments = {}
        for kind in MEDIA_KINDS:
            if items := (*self.media.get(kind, ()), *waiting.get(kind, ())):
                media[kind] = items
        answer = self._answer(turns, media)
        written = ""
        try:
            with (
                closing(self.engine.tokens(answer)) as tokens,
                closing(text_pieces(tokens, self.engine.decode)) as all_,
            ):
                for piece in all_:
                    written += piece
                    yield piece
        finally:
            self.last, self._kept = answer, answer.kept
            if written.strip():
                self.turns = (*turns, Turn("assistant", written.strip()))
                self.media, self.waiting = media, {}

    def _answer(self, turns: tuple[Turn, ...], media: Attachments) -> Answer:
        request = GenerationRequest(
            turns=turns, media={kind: [item.data for item in items] for kind, items in media.items()}
        )
        limit = self.settings.max_new_tokens
        prompt = self.engine.prompt(request, limit)
        return self.engine.answer(prompt, limit, self.settings.sampling, start=self._kept, keep=True)

    def reset(self) -> None:
        """Forget the conversation and the waiting media."""
        self.turns, self.media, self.waiting, self.last, self._kept = (), {}, {}, None, None

    def save(self, path: str | Path) -> None:
        """Write the conversation as a JSON list of one sample, as ``llava-scale data pack`` reads it.

        Raises:
            ConfigError: there is nothing to write, or no place to write it to; a file that is there is left alone.
        """
        if not self.turns:
            raise ConfigError("there is no conversation to save yet")
        file = Path(path).expanduser()
        sample: dict[str, object] = {"id": file.stem}
        media = self._files_of(str(file), sample)
        for kind, items in media.items():
            paths = [str(Path(item.path).resolve()) for item in items]
            sample[kind] = paths[0] if len(paths) == 1 else paths
        sample["conversations"] = [{"from": _NAMES[turn.role], "value": turn.text} for turn in self.turns]
        try:
            with file.open("x", encoding="utf-8") as out:
                json.dump([sample], out, ensure_ascii=False, indent=1)
                out.write("\n")
        except FileExistsError:
            raise ConfigError(f"{file} is there already; choose another name") from None
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {error.strerror}") from None

    def _files_of(self, name: str, sample: dict[str, object]) -> Attachments:
        """The media that the sample of the conversation names; sound tracks come with their videos.

        Raises:
            ConfigError: sounds whose order a record cannot tell.
        """
        videos, sounds = self.media.get("video", ()), self.media.get("audio", ())
        if not self.video_audio or not videos:
            return self.media
        if sounds[: len(videos)] != videos:
            raise ConfigError(
                f"{name} cannot be saved: sounds stand before the sound tracks of videos, which a record cannot tell"
            )
        sample[VIDEO_AUDIO] = True
        rest = {kind: items for kind, items in self.media.items() if kind != "audio"}
        return rest | ({"audio": own} if (own := sounds[len(videos) :]) else {})
