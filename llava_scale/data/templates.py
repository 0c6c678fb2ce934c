"""Chat templates as constant pieces around the contents, and as jinja for checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llava_scale.errors import SampleError
from llava_scale.types import Turn

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        {%- if not loop.last and loop.nextitem['type'] == 'text' and not loop.nextitem['text'].startswith('\\n') -%}
          {%- set joined.text = joined.text + '\\n' -%}
        {%- endif -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set joined.messages = joined.messages + [dict(message, content=joined.text)] -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""
"""Joins contents given as parts into strings: a medium becomes its placeholder, a newline before the text after it."""

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
        user_prefix: Before any later human turn.
        header: After a human turn, up to where the answer starts.
        answer_prefix: Between header and answer; supervised with it.
        answer_suffix: After an answer.
        system_prefix: Before an explicit system message.
        system_suffix: After it.
        strips: The template strips white space around contents.
        drops_system: System messages are left out.
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
    drops_system: bool = False
    takes_system: bool = True

    def system(self, content: str) -> str:
        """Text of an explicit system message that opens the conversation."""
        if not self.takes_system:
            raise SampleError("the chat template takes no system turn; move its text into the first human turn")
        return self.system_prefix + ("" if self.drops_system else content) + self.system_suffix


class Render(Protocol):
    """Renders turns through a jinja template."""

    def __call__(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        """Text of the turns."""
        ...


def derive_pieces(render: Render) -> Pieces | None:
    """Find the constant pieces of a template by rendering marked contents, and check them on other conversations.

    Returns:
        None where the template is not made of constant pieces; it must then be rendered for every conversation.
    """
    user, answer = ("QaskedQ", "QtoldQ"), ("QsaidQ", "QspokeQ")
    dialogue = [
        turn
        for asked, said in zip(user, answer, strict=True)
        for turn in (Turn("user", asked), Turn("assistant", said))
    ]
    try:
        opening = render(dialogue[:1], add_generation_prompt=True)
        first_user, found, header = opening.partition(user[0])
        tail = render(dialogue[:2])
        if not found or not tail.startswith(opening + answer[0]):
            return None
        suffix = tail[len(opening) + len(answer[0]) :]
        second = render(dialogue[:3], add_generation_prompt=True)
    except SampleError:
        return None
    if not second.startswith(tail):
        return None
    prefix, _, _ = second[len(tail) :].partition(user[1])
    pieces = Pieces(first_user=first_user, user_prefix=prefix, header=header, answer_suffix=suffix)
    pieces = _with_system(pieces, render)
    for strips in (False, True):
        checked = Pieces(**{**{name: getattr(pieces, name) for name in Pieces.__slots__}, "strips": strips})
        if _agrees(checked, render):
            return checked
    return None


def _with_system(pieces: Pieces, render: Render) -> Pieces:
    """The pieces with what the template puts around an explicit system message."""
    values = {name: getattr(pieces, name) for name in Pieces.__slots__}
    try:
        text = render([Turn("system", "QruleQ"), Turn("user", "QaskedQ")], add_generation_prompt=True)
    except SampleError:
        return Pieces(**{**values, "takes_system": False})
    before, found, rest = text.partition("QruleQ")
    between, _, _ = rest.partition("QaskedQ")
    if not found or not between.endswith(pieces.user_prefix):
        return Pieces(**{**values, "takes_system": False})
    between = between[: len(between) - len(pieces.user_prefix)]
    return Pieces(**{**values, "system_prefix": before, "system_suffix": between})


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
    text = ""
    for number, turn in enumerate(turns):
        content = turn.text.strip() if pieces.strips else turn.text
        if turn.role == "system":
            text += pieces.system(content)
        elif turn.role == "user":
            text += (pieces.first_user if number == 0 else pieces.user_prefix) + content + pieces.header
        else:
            text += pieces.answer_prefix + content + pieces.answer_suffix
    return text
