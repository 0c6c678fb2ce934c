"""Chat templates as constant pieces around the contents, and as jinja for checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from llava_scale.errors import SampleError
from llava_scale.types import PLACEHOLDERS, Turn

if TYPE_CHECKING:
    from collections.abc import Sequence

PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))

TEMPLATES = ("plain", "vicuna_v1", "native")

VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
"""System sentence of LLaVA's ``vicuna_v1`` conversation."""

CONTENT_PARTS = """\
{%- set joined = namespace(messages=[], text='') -%}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set joined.text = message['content'] -%}
  {%- else -%}
    {%- set joined.text = '' -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}
        {%- set joined.text = joined.text + part['text'] -%}
      {%- else -%}
        {%- set joined.text = joined.text + '<' + part['type'].replace('_url', '') + '>' -%}
        {%- if not loop.last and not (loop.nextitem['text'] or '').startswith('\\n') -%}
          {%- set joined.text = joined.text + '\\n' -%}
        {%- endif -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set joined.messages = joined.messages + [dict(message, content=joined.text)] -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""
"""Joins contents given as parts into strings: a medium becomes its placeholder, a newline before what follows it."""

FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""For templates that print today's date: a run resumed tomorrow must see the same tokens."""

PLAIN_JINJA = """\
{{- '@BOS@' -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- for piece in message['content'].split('<')[1:] -%}
      {%- for kind in ['image', 'video', 'audio'] -%}
        {%- if piece.startswith(kind + '>') -%}{{- '<' + kind + '>' -}}{%- endif -%}
      {%- endfor -%}
    {%- endfor -%}
  {%- elif message['role'] == 'assistant' -%}
    {{- message['content'].strip() + '\\n' -}}
  {%- endif -%}
{%- endfor -%}
"""


def vicuna_jinja(*, bos: str, end: str) -> str:
    """LLaVA's ``vicuna_v1`` conversation (separators ``" "`` and the end-of-text token)."""
    return f"""\
{{{{- '{bos}' -}}}}
{{%- if messages and messages[0]['role'] == 'system' -%}}
  {{{{- messages[0]['content'] + ' ' -}}}}
{{%- else -%}}
  {{{{- "{VICUNA_SYSTEM} " -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
  {{%- if message['role'] == 'user' -%}}
    {{{{- 'USER: ' + message['content'] + ' ASSISTANT:' -}}}}
  {{%- elif message['role'] == 'assistant' -%}}
    {{{{- ' ' + message['content'] + '{end}' -}}}}
  {{%- endif -%}}
{{%- endfor -%}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The constant strings that a template puts around the contents.

    Attributes:
        first_user: Before a human turn that opens the conversation (default system message included).
        user_prefix: Before a human turn that follows an answer.
        header: After a human turn, up to where the answer starts.
        answer_prefix: Between header and answer; supervised with it.
        answer_suffix: After an answer.
        system_prefix: Before an explicit system message.
        system_suffix: Between it and the human turn that follows.
        strips: The template strips white space around contents.
        captions: Human turns are reduced to their placeholders, system messages are left out.
        takes_system: False if the template refuses system messages.
    """

    first_user: str = ""
    user_prefix: str = ""
    header: str = ""
    answer_prefix: str = ""
    answer_suffix: str = ""
    system_prefix: str = ""
    system_suffix: str = ""
    strips: bool = False
    captions: bool = False
    takes_system: bool = True

    def content(self, turn: Turn) -> str:
        """Text of a turn as the template shows it."""
        if self.captions and turn.role != "assistant":
            return "".join(PLACEHOLDER.findall(turn.text)) if turn.role == "user" else ""
        return turn.text.strip() if self.strips else turn.text

    def prompt(self, turns: Sequence[Turn], first: int, last: int) -> str:
        """``turns[first:last]``, which hold no answer, and the header of the answer behind them.

        Raises:
            SampleError: if the roles do not alternate, or a system turn is not the first or not taken.
        """
        if first == last and not self.captions:
            raise SampleError("two answers in a row; join them or put a human turn between them")
        text = ""
        for number, turn in enumerate(turns[first:last], start=first):
            if turn.role == "system":
                self._check_system(number, last)
                text += self.system_prefix + self.content(turn) + self.system_suffix
                continue
            if number + 1 < last and turns[number + 1].role == "user":
                raise SampleError("two human turns in a row; join them or put an answer between them")
            if number == 0:
                text += self.first_user
            elif turns[number - 1].role != "system":
                text += self.user_prefix
            text += self.content(turn)
        return text + self.header

    def _check_system(self, number: int, last: int) -> None:
        if not self.takes_system:
            raise SampleError("the chat template takes no system turn; move its text into the first human turn")
        if number:
            raise SampleError("a system turn must come first; move it to the start of the conversation")
        if last == 1:
            raise SampleError("a system turn and no human turn before the answer; add one")


class Render(Protocol):
    """Renders turns through a jinja template."""

    def __call__(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        """Text of the turns."""
        ...


def derive_pieces(render: Render, special_tokens: Sequence[str]) -> Pieces | None:
    """Find the constant pieces of a template by rendering marked contents, and check them on other conversations.

    Args:
        render: Renders turns.
        special_tokens: Of the tokenizer; one of them may tell where an answer ends.

    Returns:
        None where the template is not made of constant pieces; it must then be rendered for every conversation.
    """
    asked, said, again = Turn("user", "QaskedQ"), Turn("assistant", "QsaidQ"), Turn("user", "QagainQ")
    try:
        opening = render([asked], add_generation_prompt=True)
        answered = render([asked, said])
        followed = render([asked, said, again], add_generation_prompt=True)
    except SampleError:
        return None
    first_user, found, header = opening.partition(asked.text)
    lead, found_answer, rest = followed.removeprefix(opening).partition(said.text)
    between, found_again, _ = rest.partition(again.text)
    if not (found and found_answer and found_again and followed.startswith(opening)):
        return None
    suffix = answered.removeprefix(opening + lead + said.text)
    if suffix == answered or not between.startswith(suffix):
        # The last answer is written unlike earlier ones (some templates add an empty thought): learn the earlier
        # form, which needs a token that shows where the answer ends.
        suffix = between
        if not between.startswith(tuple(special_tokens)):
            return None
    pieces = Pieces(
        first_user=first_user,
        user_prefix=between.removeprefix(suffix),
        header=header,
        answer_prefix=lead,
        answer_suffix=suffix,
    )
    pieces = _with_system(pieces, render)
    candidates = (pieces, replace(pieces, strips=True))
    return next((candidate for candidate in candidates if _agrees(candidate, render)), None)


def _with_system(pieces: Pieces, render: Render) -> Pieces:
    """The pieces with what the template puts around an explicit system message."""
    try:
        text = render([Turn("system", "QruleQ"), Turn("user", "QaskedQ")], add_generation_prompt=True)
    except SampleError:
        return replace(pieces, takes_system=False)
    before, found, rest = text.partition("QruleQ")
    between, found_user, _ = rest.partition("QaskedQ")
    if not found or not found_user:
        return replace(pieces, takes_system=False)
    return replace(pieces, system_prefix=before, system_suffix=between)


def _agrees(pieces: Pieces, render: Render) -> bool:
    """Whether the pieces give what the template renders for a long conversation with untidy contents."""
    contents = (" one", "two\n", "three <x>", "  four  ", "five", "six\n\n")
    roles = ("user", "assistant") * 3
    turns = [Turn(role, text) for role, text in zip(roles, contents, strict=True)]  # type: ignore[arg-type]
    opened = [Turn("system", " rule "), *turns]
    try:
        checks = [turns[:5], turns[:1], turns[:3], *([opened[:6], opened[:2]] if pieces.takes_system else [])]
        return all(_assemble(pieces, part) == render(part, add_generation_prompt=True) for part in checks)
    except SampleError:
        return False


def _assemble(pieces: Pieces, turns: Sequence[Turn]) -> str:
    text, seen = "", 0
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            text += pieces.prompt(turns, seen, number)
            text += pieces.answer_prefix + pieces.content(turn) + pieces.answer_suffix
            seen = number + 1
    return text + pieces.prompt(turns, seen, len(turns))
