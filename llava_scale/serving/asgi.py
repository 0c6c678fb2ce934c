"""What the routes need of ASGI beyond a framework: clients that leave, server-sent events, errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from llava_scale.serving.protocol import ApiError

_T = TypeVar("_T")
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Result of ``work``, which is cancelled if the client leaves.

    Raises:
        ClientGoneError: it left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def begin(send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    """Send status and headers."""
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def send_event(send: Send, fields: dict[str, Any]) -> None:
    """Send one server-sent event."""
    data = f"data: {json.dumps(fields, ensure_ascii=False)}\n\n".encode()
    await send({"type": "http.response.body", "body": data, "more_body": True})


def error_response(error: ApiError) -> Any:
    """Response that tells of ``error``."""
    from starlette.responses import JSONResponse

    headers = {}
    if error.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not worth reading
    if error.status == 429:
        headers["Retry-After"] = "1"
    return JSONResponse(error.body, error.status, headers)
