"""A server that speaks OpenAI's chat completions (extra ``[serve]``).

Every request passes: a place (429 without one), its body read against the limit, media read and decoded in a thread,
the batch of the worker. A client that leaves takes its answer with it, at whatever stage.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llava_scale.errors import LlavaScaleError, MissingExtraError
from llava_scale.serving.asgi import ClientGoneError, Receive, Send, begin, error_response, send_event, until_gone
from llava_scale.serving.fetch import Fetcher
from llava_scale.serving.protocol import (
    ApiError,
    ChatRequest,
    Replies,
    bad_request,
    parse_request,
    read_messages,
    usage_of,
)
from llava_scale.serving.server_metrics import ServerMetrics
from llava_scale.serving.streaming import TextStream
from llava_scale.serving.worker import Progress, Worker

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

    from llava_scale.serving.decoding import Answer
    from llava_scale.serving.engine import Engine

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What a server takes and gives.

    Attributes:
        model_name: What clients call the model.
        max_batch: Answers that run at once.
        max_queue: Requests beyond these that may be read or wait; more are refused with 429.
        max_body_mb: Longest request in MB (10**6 bytes).
        max_new_tokens: Longest answer that may be asked for.
        default_new_tokens: Longest answer where none is asked for.
        max_media: Pictures, videos and sounds of a request.
        body_timeout_s: Time for a client to send its request.
        fetcher: Reads media by URL; allows no host unless told.
    """

    model_name: str = "llava-scale"
    max_batch: int = 16
    max_queue: int = 64
    max_body_mb: float = 32.0
    max_new_tokens: int = 1024
    default_new_tokens: int = 256
    max_media: int = 32
    body_timeout_s: float = 60.0
    fetcher: Fetcher = field(default_factory=Fetcher)


def create_app(engine: Engine, settings: ServerSettings) -> Starlette:
    """The server as an ASGI application; its worker lives as long as the application.

    Raises:
        MissingExtraError: the extra ``[serve]`` is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError:
        raise MissingExtraError("starlette", "serve") from None
    service = Service(engine, settings)
    started = int(time.time())

    def refusal(error: ApiError) -> Response:
        response: Response = error_response(error)
        return response

    async def models(request: Request) -> Response:
        entry = {"id": settings.model_name, "object": "model", "created": started, "owned_by": "llava-scale"}
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [entry]})
        if name != settings.model_name:
            return refusal(service.unknown_model(name))
        return JSONResponse(entry)

    async def health(request: Request) -> Response:
        alive = service.worker.alive
        return JSONResponse({"status": "ok" if alive else "the worker has ended"}, 200 if alive else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refusal(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    routes = [
        Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: refused})


class Service:
    """The engine behind the routes: places, the worker, and the answers that wait for its tokens.

    Args:
        engine: Who answers.
        settings: Limits.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.worker = Worker(engine.decoder(settings.max_batch), self._deliver)
        self.metrics = ServerMetrics(self.worker)
        # one thread: tokenizers are changed while they pad questions
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="llava-scale-read")
        self._inboxes: dict[Answer, asyncio.Queue[Progress]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_inside = 0

    def start(self) -> None:
        """Begin to work, in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    def stop(self) -> None:
        """End all work."""
        self._reading.shutdown(cancel_futures=True)
        self.worker.stop()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Room for one request, from its first byte to its last.

        Raises:
            ApiError: there is none.
        """
        if self._num_inside >= self.settings.max_batch + self.settings.max_queue:
            raise ApiError(429, "too many requests at once; try again in a moment", code="queue_full")
        self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1

    def unknown_model(self, name: str) -> ApiError:
        """What is said about another model."""
        known = self.settings.model_name
        return ApiError(404, f"there is no model {name!r} here, only {known!r}", code="model_not_found", param="model")

    async def prepare(self, request: ChatRequest) -> Answer:
        """The request as an answer that can be worked on.

        Raises:
            ApiError: it cannot be used.
        """
        if request.model != self.settings.model_name:
            raise self.unknown_model(request.model)
        asked, most = request.token_limit, self.settings.max_new_tokens
        if asked is not None and asked > most:
            raise ApiError(400, f"max_tokens must be at most {most}, got {asked}", param="max_tokens")
        loop = asyncio.get_running_loop()
        try:
            conversation = await loop.run_in_executor(
                self._reading, lambda: read_messages(request.messages, max_media=self.settings.max_media)
            )
            generation = await asyncio.to_thread(conversation.request, self.settings.fetcher.fetch)
            return await loop.run_in_executor(self._reading, lambda: self._answer(request, generation, asked))
        except LlavaScaleError as error:
            raise bad_request(error) from None

    def _answer(self, request: ChatRequest, generation: Any, asked: int | None) -> Answer:
        prompt = self.engine.prompt(generation, asked or 1)
        limit = asked
        if limit is None:
            limit = min(self.settings.default_new_tokens, self.settings.max_new_tokens)
            if context := self.engine.context_length:
                limit = min(limit, context - len(prompt.input_ids))
        return self.engine.answer(prompt, limit, request.sampling)

    async def progress(self, answer: Answer) -> AsyncGenerator[Progress, None]:
        """Yield what happens to ``answer`` until it ends; closing the generator takes it out of the batch."""
        inbox: asyncio.Queue[Progress] = asyncio.Queue()
        self._inboxes[answer] = inbox
        self.worker.submit(answer)
        start, is_first = time.perf_counter(), True
        try:
            while True:
                event = await inbox.get()
                if is_first:
                    self.metrics.first_token.observe(time.perf_counter() - start)
                    is_first = False
                if event.error is not None:
                    _log.error("an answer failed", exc_info=event.error)
                    raise ApiError(500, "the model failed at this request", code="generation_failed")
                yield event
                if event.finish:
                    return
        finally:
            del self._inboxes[answer]
            self.worker.cancel(answer)
            self.metrics.tokens.labels("prompt").inc(answer.num_prefilled)
            self.metrics.tokens.labels("answer").inc(len(answer.new_ids))

    def _deliver(self, events: Sequence[Progress]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._hand_out, events)
        except RuntimeError:  # the loop is closed: nobody waits
            return

    def _hand_out(self, events: Sequence[Progress]) -> None:
        for event in events:
            if inbox := self._inboxes.get(event.answer):
                inbox.put_nowait(event)


class ChatCompletions:
    """The route that answers, as an ASGI application.

    Args:
        service: Who does the work.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        from starlette.requests import ClientDisconnect, Request

        start, status = time.perf_counter(), 200
        request = Request(scope, receive)
        try:
            with self._service.place():
                parsed = parse_request(await self._body(request))
                answer = await until_gone(receive, self._service.prepare(parsed))
                work = self._stream(send, parsed, answer) if parsed.stream else self._whole(send, parsed, answer)
                await until_gone(receive, work)
        except ApiError as error:
            status = error.status
            await error_response(error)(scope, receive, send)
        except (ClientGoneError, ClientDisconnect):
            status = 499
        except Exception:
            _log.exception("a request failed")
            status = 500
            await error_response(ApiError(500, "the server failed at this request"))(scope, receive, send)
        finally:
            self._service.metrics.requests.labels(str(status)).inc()
            self._service.metrics.seconds.observe(time.perf_counter() - start)

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than the limit."""
        settings = self._service.settings
        limit = int(settings.max_body_mb * 1e6)
        too_long = ApiError(413, f"the request is longer than {settings.max_body_mb:g} MB", code="request_too_large")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the request must have the content type application/json")
        if int(request.headers.get("content-length", "0")) > limit:
            raise too_long

        async def read() -> bytes:
            body = bytearray()
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_long
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), settings.body_timeout_s)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the request did not come within {settings.body_timeout_s:g} s") from None

    async def _whole(self, send: Send, request: ChatRequest, answer: Answer) -> None:
        text = ""
        reason = "stop"
        async with aclosing(self._pieces(request, answer)) as pieces:
            async for piece, finish in pieces:
                text += piece
                reason = finish or reason
        usage = usage_of(len(answer.prompt.input_ids), len(answer.new_ids))
        body = json.dumps(Replies(request.model).whole(text, reason, usage), ensure_ascii=False).encode()
        length = str(len(body)).encode()
        await begin(send, 200, [(b"content-type", b"application/json"), (b"content-length", length)])
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send, request: ChatRequest, answer: Answer) -> None:
        replies = Replies(request.model)
        await begin(
            send, 200, [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        )
        await send_event(send, replies.chunk({"role": "assistant", "content": ""}))
        try:
            async with aclosing(self._pieces(request, answer)) as pieces:
                async for piece, finish in pieces:
                    if piece:
                        await send_event(send, replies.chunk({"content": piece}))
                    if finish:
                        await send_event(send, replies.chunk({}, finish))
            if request.stream_options is not None and request.stream_options.include_usage:
                usage = usage_of(len(answer.prompt.input_ids), len(answer.new_ids))
                await send_event(send, replies.usage_chunk(usage))
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        except ApiError as error:  # the status has gone out already
            await send_event(send, error.body)
        await send({"type": "http.response.body", "body": b""})

    async def _pieces(self, request: ChatRequest, answer: Answer) -> AsyncGenerator[tuple[str, str], None]:
        """Yield (text, why the answer ended or nothing)."""
        text = TextStream(self._service.engine.decode, request.stops)
        async with aclosing(self._service.progress(answer)) as events:
            async for event in events:
                piece = ""
                for token_id in event.new_ids:
                    piece += text.push(token_id)
                    if text.stopped:
                        yield piece, "stop"
                        return
                yield piece + (text.end() if event.finish else ""), "stop" if text.stopped else event.finish
