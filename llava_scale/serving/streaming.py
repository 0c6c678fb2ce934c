"""Token ids to the text that is read, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

_UNFINISHED = "�"


class TextStream:
    """Text of an answer as its tokens come; the pieces together are the stripped text of all of them.

    Characters made of several tokens are held back until they are whole, space until something follows it, and what
    could be the beginning of a stop text until it is known.

    Args:
        decode: Token ids to text.
        stops: Texts that end the answer, and are no part of it.

    Attributes:
        num_tokens: Tokens that came.
        stopped: Whether a stop text was met; nothing more comes then.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._seen: list[int] = []
        self._given = 0
        self.stopped = False

    @property
    def num_tokens(self) -> int:
        """Tokens that came."""
        return len(self._seen)

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is certain now, often nothing."""
        self._seen.append(token_id)
        # only the last character can still change: what stands before it is whole, or will never be
        text = self._decode(self._seen).lstrip().removesuffix(_UNFINISHED)
        cut = self._cut(text)
        if cut is not None:
            return self._give(text[:cut].rstrip())
        return self._give(text[: len(text) - self._held(text)].rstrip())

    def end(self) -> str:
        """What was held back to the end."""
        if self.stopped:
            return ""
        text = self._decode(self._seen).strip()
        cut = self._cut(text)
        return self._give(text if cut is None else text[:cut].rstrip())

    def _cut(self, text: str) -> int | None:
        found = [place for place in map(text.find, self._stops) if place >= 0]
        self.stopped = self.stopped or bool(found)
        return min(found, default=None)

    def _held(self, text: str) -> int:
        """Characters at the end that a stop text could begin with."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _give(self, ready: str) -> str:
        piece = ready[self._given :]
        self._given = max(self._given, len(ready))
        return piece


def text_pieces(
    ids: Iterable[int], decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()
) -> Generator[str, None, None]:
    """Yield the text of ``ids`` in pieces, up to a stop text."""
    stream = TextStream(decode, stops)
    for token_id in ids:
        if piece := stream.push(token_id):
            yield piece
        if stream.stopped:
            return
    if piece := stream.end():
        yield piece
