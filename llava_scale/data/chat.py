"""Conversations to token ids and loss masks through a chat template.

A conversation is cut into units: everything up to and including the assistant's header is one string, the answer with
its end-of-turn marker the next. Each unit is tokenised alone, so generation sees exactly the ids that training saw.
Tokenizers that put a space before a text (Llama's) get the end of the unit before as context, so that units join as
the whole text would.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llava_scale.data.templates import (
    CONTENT_PARTS,
    FIXED_DATE,
    PLAIN_JINJA,
    TEMPLATES,
    VICUNA_SYSTEM,
    Pieces,
    derive_pieces,
    vicuna_jinja,
)
from llava_scale.errors import ConfigError, SampleError, suggest
from llava_scale.types import PLACEHOLDERS, MediaKind, Turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

_MARK = "QansweredQ"
_MAX_BYTES = 4  # of one character in UTF-8


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Token ids of a conversation; each placeholder is one id.

    Attributes:
        input_ids: Token ids.
        answers: First and last-but-one place of each stretch where the loss counts: an answer with its end-of-turn
            marker.
    """

    input_ids: list[int]
    answers: tuple[tuple[int, int], ...]

    @property
    def supervised(self) -> list[bool]:
        """For each id whether the loss counts it."""
        mask = [False] * len(self.input_ids)
        for start, stop in self.answers:
            mask[start:stop] = [True] * (stop - start)
        return mask


class ChatEncoder:
    """Renders and tokenises conversations as training and generation see them.

    Args:
        tokenizer: Of the language model, with the placeholders added as special tokens.
        template: ``plain`` (placeholders, caption, newline: LLaVA's alignment stage), ``vicuna_v1``, or ``native``
            for ``tokenizer.chat_template``.

    Raises:
        ConfigError: unknown template; ``native`` without a usable template; placeholders missing in the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        if template not in TEMPLATES:
            raise ConfigError(f"unknown chat_template {template!r}; {suggest(template, TEMPLATES)}")
        self.template = template
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self.placeholder_ids: dict[MediaKind, int] = {
            kind: self._special_id(marker) for kind, marker in PLACEHOLDERS.items()
        }
        self._bos = _leading_bos(tokenizer)
        self._openings: dict[str, list[int]] = {}
        self._adds_space = self._encode("a") != self._encode(":a")[len(self._encode(":")) :]
        self._native = self._native_template() if template == "native" else ""
        self._pieces = self._make_pieces()
        self._check_turns_end()
        self._openings = self._constant_openings()

    @cached_property
    def jinja(self) -> str:
        """Chat template for ``apply_chat_template``: renders as ``render_prompt``; contents may be strings or parts."""
        if self.template == "plain":
            return CONTENT_PARTS + PLAIN_JINJA.replace("@BOS@", self._bos)
        if self.template == "vicuna_v1":
            return CONTENT_PARTS + vicuna_jinja(bos=self._bos, end=self._end_of_text())
        return CONTENT_PARTS + self._native

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer when generated."""
        eos = self._tokenizer.eos_token_id
        return tuple(dict.fromkeys([self._last_id, *([eos] if isinstance(eos, int) else [])]))

    def fingerprint(self) -> str:
        """Changes whenever any conversation could be tokenised differently."""
        return self._fingerprint

    def encode(self, turns: Sequence[Turn]) -> EncodedText:
        """Ids of the conversation up to its last answer, with the mask of what is supervised.

        Raises:
            SampleError: no assistant turn, or the template refuses the order of the roles.
        """
        input_ids: list[int] = []
        answers: list[tuple[int, int]] = []
        before = ""
        for text, is_answer in self._units(turns):
            start = len(input_ids)
            input_ids += self._ids(text, before)
            before = text
            if is_answer:
                answers += self._without_placeholders(input_ids, start)
        if not input_ids:
            raise SampleError("the conversation has no assistant turn to learn from")
        return EncodedText(input_ids, tuple(answers))

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids up to and including the header of the answer that is to be generated."""
        ids: list[int] = []
        before = ""
        for text, _ in self._prompt_units(turns):
            ids += self._ids(text, before)
            before = text
        return ids

    def render_prompt(self, turns: Sequence[Turn]) -> str:
        """Text of ``encode_prompt``."""
        return "".join(text for text, _ in self._prompt_units(turns))

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Text of each token, for people; of several tokens that make one character, the last one has it."""
        anchor = self._encode(":")  # keeps decoders from stripping the space before a first word
        known = len(self._decode(anchor))
        texts: list[str] = []
        held: list[int] = []
        for token in ids:
            held.append(token)
            text = self._decode([*anchor, *held])[known:]
            whole = "\ufffd" not in text or len(held) == _MAX_BYTES
            texts.append(text if whole else "")
            held = [] if whole else held
        if held:
            texts[-1] = self._decode([*anchor, *held])[known:]
        return texts

    def inner_ids(self, text: str) -> list[int]:
        """Ids of a piece of text that stands inside of a message, such as a time stamp between frames."""
        return self._ids(text, ":")

    def is_special(self, token: int) -> bool:
        """Whether ``token`` stands for itself: a role marker, an end of turn, a placeholder."""
        return token in self._special_ids

    def _without_placeholders(self, ids: list[int], start: int) -> list[tuple[int, int]]:
        """The stretches of ``ids[start:]`` between placeholders: one, unless an answer speaks of them."""
        answer, stretches = ids[start:], []
        markers = self.placeholder_ids.values()
        for number, token in enumerate(answer) if any(marker in answer for marker in markers) else ():
            if token in markers:
                stretches.append((start, start := number + len(ids) - len(answer)))
                start += 1
        return [*stretches, (start, len(ids))]

    def _units(self, turns: Sequence[Turn]) -> Iterator[tuple[str, bool]]:
        """(text, is an answer) of every unit up to the last answer."""
        carried = ""
        seen = 0
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            yield carried + self._stretch(turns, seen, number), False
            answer, carried = self._answer(turns, number)
            yield answer, True
            seen = number + 1

    def _prompt_units(self, turns: Sequence[Turn]) -> Iterator[tuple[str, bool]]:
        seen = 0
        carried = ""
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                yield carried + self._stretch(turns, seen, number), False
                answer, carried = self._answer(turns, number)
                yield answer, True
                seen = number + 1
        yield carried + self._stretch(turns, seen, len(turns)), False

    def _stretch(self, turns: Sequence[Turn], first: int, last: int) -> str:
        """Text of ``turns[first:last]`` with the assistant's header behind it."""
        if self._pieces is None:
            shown = self._render(turns[:first]) if first else ""
            whole = self._render(turns[:last], add_generation_prompt=True)
            return _after(whole, shown)
        return self._pieces.prompt(turns, first, last)

    def _answer(self, turns: Sequence[Turn], number: int) -> tuple[str, str]:
        """(answer with its end-of-turn marker, what the template puts behind that)."""
        if self._pieces is not None:
            end, rest = self._end
            return self._pieces.answer_prefix + self._pieces.content(turns[number]) + end, rest
        marked = self._tail([*turns[:number], Turn("assistant", _MARK)])
        lead, found, suffix = marked.partition(_MARK)
        tail = self._tail(turns[: number + 1])
        answer = tail[: len(tail) - len(suffix)]
        kept = answer.strip() == (lead + turns[number].text.strip()).strip()
        if not (found and kept and tail.endswith(suffix)):
            raise SampleError("the chat template changes the text of answers; use another (data.chat_template)")
        end, rest = self._split_end(suffix)
        return answer + end, rest

    def _tail(self, turns: Sequence[Turn]) -> str:
        """What the native template puts behind the prompt for the last turn, an answer."""
        return _after(self._render(turns), self._render(turns[:-1], add_generation_prompt=True))

    @cached_property
    def _end(self) -> tuple[str, str]:
        assert self._pieces is not None
        return self._split_end(self._pieces.answer_suffix)

    def _split_end(self, suffix: str) -> tuple[str, str]:
        """Cut what follows an answer into the marker that ends it and the rest, which is not supervised."""
        for token in self._special_tokens:
            if suffix.startswith(token):
                return token, suffix[len(token) :]
        return suffix, ""

    def _check_turns_end(self) -> None:
        """Refuse a template with which nothing could be learned, before the first sample."""
        question, answer = Turn("user", "question"), Turn("assistant", "answer")
        try:
            text, _ = self._answer((question, answer), 1)
        except SampleError as error:
            raise ConfigError(
                f"the language model's chat template cannot be used ({error.reason}); use 'vicuna_v1' or 'plain'"
            ) from None
        if text.endswith(answer.text):
            raise ConfigError(
                "the language model's chat template puts nothing behind an answer, so the model could not learn where "
                "to stop; use 'vicuna_v1' or 'plain'"
            )
        self._last_id = self._ids(text)[-1]

    def _make_pieces(self) -> Pieces | None:
        if self.template == "plain":
            return Pieces(first_user=self._bos, answer_suffix="\n", system_prefix=self._bos, strips=True, captions=True)
        if self.template == "vicuna_v1":
            return Pieces(
                first_user=f"{self._bos}{VICUNA_SYSTEM} USER: ",
                user_prefix="USER: ",
                header=" ASSISTANT:",
                answer_prefix=" ",
                answer_suffix=self._end_of_text(),
                system_prefix=self._bos,
                system_suffix=" USER: ",
            )
        return derive_pieces(self._render, self._special_tokens)

    def _native_template(self) -> str:
        template = self._tokenizer.chat_template
        if not isinstance(template, str) or not template:
            raise ConfigError(
                "data.chat_template is 'native', but the language model's tokenizer has no chat template; "
                "use 'vicuna_v1' or 'plain'"
            )
        return FIXED_DATE + template if "strftime_now" in template else template

    def _render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, chat_template=self._native, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise jinja's errors, TypeErrors, anything
            roles = ", ".join(turn.role for turn in turns)
            raise SampleError(f"the chat template refuses the turns {roles}: {error}") from None
        assert isinstance(rendered, str)
        return rendered

    def _ids(self, text: str, before: str = "") -> list[int]:
        """Ids of one unit; ``before`` is the text in front of it."""
        if not before:
            for opening, ids in self._openings.items():
                if text.startswith(opening):
                    return ids + self._ids(text[len(opening) :], opening)
        if before and self._adds_space:
            context = next((token for token in self._special_tokens if before.endswith(token)), before[-1])
            known, ids = self._ids(context), self._ids(context + text)
            if ids[: len(known)] == known:
                return ids[len(known) :]
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        if self._backend is not None:
            if self._backend.truncation is not None or self._backend.padding is not None:
                self._forget_limits()
            # without offsets of characters, and without holding the interpreter lock as ``encode`` does
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return ids
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _constant_openings(self) -> dict[str, list[int]]:
        """Ids of what opens nearly every conversation: system message and first placeholder.

        Tokenizers cut the text at special tokens, so the rest can be tokenised alone; where one does not (some strip
        the space around them), its opening is left out.
        """
        openings: dict[str, list[int]] = {}
        if self._pieces is None:
            return openings
        for marker in PLACEHOLDERS.values():
            opening = self._pieces.first_user + marker
            ids, probe = self._encode(opening), "\nprobe"
            if self._encode(opening + probe) == ids + self._ids(probe, opening):
                openings[opening] = ids
        return openings

    def _forget_limits(self) -> None:
        """Undo what an earlier call of the tokenizer left behind: it would silently cut or pad our texts."""
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()

    def _decode(self, ids: Sequence[int]) -> str:
        decoder = self._backend if self._backend is not None else self._tokenizer
        return str(decoder.decode(list(ids), skip_special_tokens=False))

    def _special_id(self, marker: str) -> int:
        number: Any = self._tokenizer.convert_tokens_to_ids(marker)
        if not isinstance(number, int) or number == self._tokenizer.unk_token_id:
            raise ConfigError(f"the tokenizer has no token {marker!r}; add the placeholders as special tokens first")
        return number

    def _end_of_text(self) -> str:
        eos = self._tokenizer.eos_token
        if not isinstance(eos, str):
            raise ConfigError("the tokenizer has no eos_token, so the model could not learn where an answer ends")
        return eos

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_vocab().values())

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        tokens = {str(token) for token in self._tokenizer.get_added_vocab()}
        return tuple(sorted(tokens, key=len, reverse=True))

    @cached_property
    def _fingerprint(self) -> str:
        self._forget_limits()
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"1\n{self.template}\n{self.jinja}\n".encode())
        described = self._backend.to_str() if self._backend is not None else repr(sorted(self._tokenizer.get_vocab()))
        digest.update(described.encode())
        return digest.hexdigest()


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The BOS token's text where the tokenizer puts it before a text on its own, else nothing."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return ""
    return str(tokenizer.bos_token)


def _after(whole: str, start: str) -> str:
    if not whole.startswith(start):
        raise SampleError("the chat template rewrites earlier turns, so answers cannot be found in it; use another")
    return whole[len(start) :]
