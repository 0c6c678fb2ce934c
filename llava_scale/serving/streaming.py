"""Token ids to the text that is read, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

_UNFINISHED = "�"
_LONGEST_CHARACTER = 4
"""Bytes, and so tokens, of the longest characters."""


class TextStream:
    """Text of an answer as its tokens come; the pieces together are the stripped text of all of them.

    Characters made of several tokens are held back until they are whole, space until something follows it, and what
    could be the beginning of a stop text until it is known. A token's work does not grow with the answer.

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
        self.num_tokens = 0
        self._text = self._settled = ""
        # decoders treat the first token otherwise: the last settled ones are decoded before what is new
        self._context: list[int] = []
        self._context_text = ""
        self._fresh: list[int] = []
        self._given = 0
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is certain now, often nothing."""
        self.num_tokens += 1
        self._decode_on(token_id)
        text = self._whole_characters().lstrip()
        cut = self._cut(text)
        if cut is not None:
            return self._give(text[:cut].rstrip())
        return self._give(text[: len(text) - self._held(text)].rstrip())

    def end(self) -> str:
        """What was held back to the end."""
        if self.stopped:
            return ""
        text = self._text.strip()
        cut = self._cut(text)
        return self._give(text if cut is None else text[:cut].rstrip())

    def _decode_on(self, token_id: int) -> None:
        """Bring the text up to date; only the tokens since the last whole character are decoded."""
        self._fresh.append(token_id)
        decoded = self._decode([*self._context, *self._fresh])
        self._text = self._settled + decoded[len(self._context_text) :]
        if len(self._text) > len(self._settled) and not self._text.endswith(_UNFINISHED):
            self._settled, self._context, self._fresh = self._text, self._fresh, []
            self._context_text = self._decode(self._context)

    def _whole_characters(self) -> str:
        """Text without the end that can still change; what stands before that is whole, or will never be."""
        if len(self._fresh) < _LONGEST_CHARACTER:  # some decoders write each byte of an unfinished character by itself
            return self._text.rstrip(_UNFINISHED)
        return self._text.removesuffix(_UNFINISHED)

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
