"""The chat completions of OpenAI's API: what clients send, and what they get back."""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llava_scale.errors import SampleError
from llava_scale.serving.prompts import GenerationRequest
from llava_scale.serving.sampling import Sampling
from llava_scale.types import PLACEHOLDERS, MediaKind, Turn

NEUTRAL = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "frequency_penalty": (0,), "presence_penalty": (0,),
    "logit_bias": ({},), "tools": ([],), "functions": ([],), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "tool_choice": ("none", "auto"), "best_of": (1,), "echo": (False,),
}  # fmt: skip
"""Parameters of the API that are not supported, with the values that mean nothing."""

IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
)  # fmt: skip
"""Parameters that change no answer."""

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
}  # fmt: skip


class ApiError(Exception):
    """An answer with an error status, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, code: str = "", param: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kinds = {429: "rate_limit_error", 404: "not_found_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param or None, "code": self.code or None}
        return {"error": error}


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Url(_Part):
    url: str


class _Sound(_Part):
    data: str
    format: str


class TextPart(_Part):
    """Words."""

    type: Literal["text"]
    text: str


class ImagePart(_Part):
    """A picture."""

    type: Literal["image_url"]
    image_url: _Url


class VideoPart(_Part):
    """A video."""

    type: Literal["video_url"]
    video_url: _Url


class AudioPart(_Part):
    """A sound."""

    type: Literal["input_audio"]
    input_audio: _Sound


class AudioUrlPart(_Part):
    """A sound, or a video whose sound is meant, by URL."""

    type: Literal["audio_url"]
    audio_url: _Url


Part = Annotated[TextPart | ImagePart | VideoPart | AudioPart | AudioUrlPart, Field(discriminator="type")]


class Message(_Part):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(_Part):
    """Of a streamed answer."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of ``/v1/chat/completions``."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; the likeliest unless a temperature is asked for."""
        temperature = self.temperature or 0.0
        return Sampling(temperature=temperature, top_p=(self.top_p or 1.0) if temperature else 1.0, seed=self.seed)

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def token_limit(self) -> int | None:
        """Longest answer that is asked for."""
        return self.max_completion_tokens or self.max_tokens


def parse_request(body: bytes) -> ChatRequest:
    """Read the body of a request.

    Raises:
        ApiError: it is no JSON, or asks for something that does not exist here.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = max(error.errors(include_url=False, include_input=False), key=lambda found: len(found["loc"]))
        where = _place(first["loc"])
        raise ApiError(400, f"{where}: {first['msg']}", param=where) from None
    for name, value in (request.model_extra or {}).items():
        if name in IGNORED or value is None or value in NEUTRAL.get(name, ()):
            continue
        what = f"this value of {name!r} is not supported" if name in NEUTRAL else f"unknown parameter {name!r}"
        raise ApiError(400, what, param=name, code="unsupported_parameter")
    return request


def _place(loc: tuple[int | str, ...]) -> str:
    """Place of an error without what pydantic adds to it: which of several types it tried."""
    parts = [str(part) for part in loc if part != "str" and "[" not in str(part)]
    return ".".join(part for number, part in enumerate(parts) if part != (parts[number - 1] if number else ""))


@dataclass(slots=True)
class Conversation:
    """Turns, and where their media come from.

    Attributes:
        turns: With placeholders where media stand.
        media: Kind and source of each medium: bytes, or an https URL that is still to be read.
    """

    turns: list[Turn] = field(default_factory=list)
    media: list[tuple[MediaKind, bytes | str]] = field(default_factory=list)

    def request(self, fetch: Callable[[str], bytes]) -> GenerationRequest:
        """The request with all media read.

        Raises:
            SampleError: one cannot be fetched.
        """
        media: dict[MediaKind, list[bytes]] = {}
        for kind, source in self.media:
            media.setdefault(kind, []).append(fetch(source) if isinstance(source, str) else source)
        return GenerationRequest(turns=tuple(self.turns), media=media)


def read_messages(messages: list[Message], *, max_media: int) -> Conversation:
    """Turns and media of a conversation; base64 is decoded here.

    A medium stands where its part stands, unless the texts hold its kind's placeholder themselves.

    Raises:
        ApiError: a medium is no base64 or of another kind, or there are too many.
    """
    texts = [part.text for message in messages for part in _parts(message) if isinstance(part, TextPart)]
    placed = {kind for kind, marker in PLACEHOLDERS.items() if any(marker in text for text in texts)}
    conversation = Conversation()
    for number, message in enumerate(messages):
        text = ""
        for place, part in enumerate(_parts(message)):
            where = f"messages.{number}.content.{place}"
            if isinstance(part, TextPart):
                text = _next_line(text, part.text) + part.text
                continue
            if message.role != "user":
                raise ApiError(400, f"{where}: only messages of the user hold media", param=where)
            kind, source = _medium(part, where)
            conversation.media.append((kind, source))
            if kind not in placed:
                text = _next_line(text, "") + PLACEHOLDERS[kind]
        _add_turn(conversation.turns, Turn(_ROLES[message.role], text))
    if len(conversation.media) > max_media:
        raise ApiError(400, f"the conversation holds {len(conversation.media)} media, at most {max_media} are taken",
                       param="messages")  # fmt: skip
    return conversation


def _add_turn(turns: list[Turn], turn: Turn) -> None:
    """Add ``turn``; several messages of the user, or of the system, one after the other are one on several lines."""
    if turns and turn.role == turns[-1].role != "assistant":
        turn = Turn(turn.role, f"{turns.pop().text}\n{turn.text}")
    turns.append(turn)


def _next_line(text: str, following: str) -> str:
    """``text`` with a line break where it ends with a medium and ``following`` brings none: what training saw."""
    return f"{text}\n" if text.endswith(tuple(PLACEHOLDERS.values())) and not following.startswith("\n") else text


def _parts(message: Message) -> list[Any]:
    return [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content


def _medium(part: ImagePart | VideoPart | AudioPart | AudioUrlPart, where: str) -> tuple[MediaKind, bytes | str]:
    if isinstance(part, AudioPart):
        return "audio", _decoded(part.input_audio.data, where)
    if isinstance(part, AudioUrlPart):
        return "audio", _located(part.audio_url.url, ("audio", "video"), where)
    if isinstance(part, ImagePart):
        return "image", _located(part.image_url.url, ("image",), where)
    return "video", _located(part.video_url.url, ("video",), where)


def _located(url: str, types: tuple[str, ...], where: str) -> bytes | str:
    """Content of a data: URL whose type begins with one of ``types``; any other URL as it is."""
    if url[:5].lower() != "data:":
        return url
    head, comma, data = url[5:].partition(",")
    kind, _, rest = head.lower().partition("/")
    if not comma or kind not in types or not rest.endswith(";base64"):
        raise ApiError(400, f"{where}: the URL must begin with data:{types[0]}/...;base64,", param=where)
    return _decoded(data, where)


def _decoded(data: str, where: str) -> bytes:
    try:
        content = base64.b64decode(data.replace("\n", "").replace("\r", ""), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{where}: malformed base64: {error}", param=where, code="invalid_base64") from None
    if not content:
        raise ApiError(400, f"{where}: the medium is empty", param=where)
    return content


def bad_request(error: Exception) -> ApiError:
    """What the client is told when the engine cannot use its request."""
    reason = error.reason if isinstance(error, SampleError) else str(error)
    return ApiError(400, reason, param="messages")


@dataclass(frozen=True, slots=True)
class Replies:
    """Makes the objects that make up one answer."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer at once."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        """A piece of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece, where usage was asked for."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage_of(num_prompt: int, num_new: int) -> dict[str, int]:
    """Token counts of a request."""
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}
