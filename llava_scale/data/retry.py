"""Repeat what failed for reasons that pass."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING, TypeVar

from llava_scale.errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Callable

    from llava_scale.data.store import RetryPolicy

T = TypeVar("T")

_log = logging.getLogger(__name__)

_CLIENTS = frozenset(
    (
        "aiohttp",
        "aiobotocore",
        "azure",
        "botocore",
        "fsspec",
        "gcsfs",
        "httpx",
        "huggingface_hub",
        "requests",
        "urllib3",
    )
)
"""Libraries below fsspec whose own exceptions mean that the transfer failed."""

_FATAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_RETRIED_STATUS = frozenset((408, 425, 429))


class ShortReadError(OSError):
    """A server sent fewer bytes than were asked for."""


def with_retries(
    function: Callable[[], T], *, where: str, policy: RetryPolicy, on_retry: Callable[[], None] = lambda: None
) -> T:
    """Return ``function()``, called again with growing random pauses while it fails for reasons that may pass.

    Raises:
        FileNotFoundError: as it comes.
        ShardError: naming ``where``, if it failed for good or too often.
    """
    delay = policy.first_delay_s
    for attempt in range(1, policy.attempts + 1):
        try:
            return function()
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not _masked(error):
                raise
            if not is_transient(error):
                raise ShardError(f"{where}: {_reason(error)}") from error
            if attempt == policy.attempts:
                raise ShardError(
                    f"{where}: failed {attempt} times, at last with {_reason(error)}; check the connection and the "
                    "server, then run again"
                ) from error
            pause = delay * random.uniform(0.5, 1.0)
            _log.warning(
                "%s: %s; trying again in %.1f s (%d of %d)", where, _reason(error), pause, attempt, policy.attempts
            )
            on_retry()
            time.sleep(pause)
            delay = min(2 * delay, policy.max_delay_s)
    raise AssertionError("unreachable")


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    if isinstance(error, FileNotFoundError) and _masked(error):
        return True
    if isinstance(error, _FATAL):
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _RETRIED_STATUS
    if isinstance(error, OSError | EOFError | asyncio.TimeoutError):
        return True
    return type(error).__module__.partition(".")[0] in _CLIENTS


def _masked(error: BaseException) -> bool:
    """Return whether a "not found" stands for another failure (fsspec's size request over HTTP does that)."""
    cause = error.__cause__
    if cause is None or getattr(cause, "status", None) == 404:
        return False
    from_web = type(cause).__module__.partition(".")[0] == "aiohttp" or isinstance(cause, asyncio.TimeoutError)
    return from_web and is_transient(cause)


def _reason(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
