"""Tokens from the thread that generates to the text that is read, piece by piece."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from torch import Tensor

_UNFINISHED = "�"


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Raised inside ``generate`` when nobody reads the answer any more."""


class TokenQueue:
    """Streamer for ``generate``: hands each new token id to another thread."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._saw_prompt = False

    def put(self, tokens: Tensor) -> None:
        """Called by ``generate``: first with the prompt, then with each token.

        Raises:
            Stopped: after ``stop``.
        """
        if self._stop.is_set():
            raise Stopped
        if self._saw_prompt:
            self._items.put(int(tokens.reshape(-1)[0]))
        self._saw_prompt = True

    def end(self) -> None:
        """Called by ``generate`` after the last token."""
        self._items.put(None)

    def fail(self, error: BaseException) -> None:
        """End with an error, which the reader gets."""
        self._items.put(error)

    def stop(self) -> None:
        """Make ``generate`` give up at its next token."""
        self._stop.set()

    def __iter__(self) -> Iterator[int]:
        while (item := self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


def token_ids(generate: Callable[[TokenQueue], object]) -> Generator[int, None, None]:
    """Run ``generate`` in a thread and yield its token ids as they come.

    Closing the iterator, or an exception where it is read, stops the thread and waits for it (one token's time).
    """
    tokens = TokenQueue()

    def work() -> None:
        try:
            generate(tokens)
            tokens.end()
        except Stopped:
            pass
        except BaseException as error:  # whatever it is, the reader must get it, not a silent end
            tokens.fail(error)

    thread = threading.Thread(target=work, name="llava-scale-stream", daemon=True)
    thread.start()
    try:
        yield from tokens
    finally:
        tokens.stop()
        thread.join()


def text_pieces(ids: Iterator[int], decode: Callable[[Sequence[int]], str], end_ids: Sequence[int]) -> Iterator[str]:
    """Yield the text of ``ids`` in pieces that together are the stripped text of all of them.

    Characters made of several tokens are held back until they are whole, space until something follows it.
    """
    seen: list[int] = []
    given = 0
    for token_id in ids:
        if token_id in end_ids:
            break
        seen.append(token_id)
        # only the last character can still change: what stands before it is whole, or will never be
        ready = decode(seen).lstrip().removesuffix(_UNFINISHED).rstrip()
        if len(ready) > given:
            yield ready[given:]
            given = len(ready)
    rest = decode(seen).strip()[given:]
    if rest:
        yield rest
