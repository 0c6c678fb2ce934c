"""Pages that are made from the program itself: its commands and its settings."""

from __future__ import annotations

import types
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer.main

from llava_scale.cli import build_app
from llava_scale.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterator


def write_pages(folder: Path) -> None:
    """Write ``commands.md`` and ``settings.md`` where they changed."""
    for name, text in (("commands.md", commands_page()), ("settings.md", settings_page())):
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def commands_page() -> str:
    """Every command with its arguments and options."""
    lines = ["# Commands", "", "`llava-scale COMMAND --help` prints the same.", ""]
    for path, command in _commands(typer.main.get_command(build_app()), ("llava-scale",)):
        context = command.context_class(command)
        usage = " ".join(piece for piece in command.collect_usage_pieces(context) if piece)
        lines += [f"## {' '.join(path[1:])}", "", _plain(command.help), "", f"    {' '.join(path)} {usage}", ""]
        rows = [row for parameter in command.params if (row := _parameter_row(parameter))]
        if rows:
            lines += ["| option | default | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    for name, child in children.items():
        if not child.hidden:
            yield from _commands(child, (*path, name))


def _parameter_row(parameter: Any) -> str:
    shown = " / ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        shown = f"`{parameter.metavar or parameter.name.upper()}`"
    default = getattr(parameter.default, "value", parameter.default)  # of a choice
    known = default not in (None, "", (), False) and not callable(default) and not parameter.required
    return f"| {shown} | {f'`{default}`' if known else ''} | {_cell(getattr(parameter, 'help', '') or '')} |"


def settings_page() -> str:
    """Every setting with its type, default and meaning."""
    intro = (
        "A recipe is a YAML file; `key=value` behind it on the command line wins: `train.steps=200`, "
        "`'data.sources=[{path: data/train}]'`. An unknown key, a wrong type or a value out of range is an error. "
        "`llava-scale train RECIPE --print-config` prints all settings of a run."
    )
    return "\n".join(["# Settings", "", intro, "", *_section(Config, "")])


def _section(cls: type, prefix: str) -> list[str]:
    lines = [f"## `{prefix}`" if prefix else "## Top level", "", _plain(cls.__doc__), ""]
    lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    nested: list[str] = []
    for name, info in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        key = f"{prefix}.{name}" if prefix else name
        sections = list(_sections_in(info.annotation))
        if len(sections) == 1 and get_origin(info.annotation) is not tuple:
            nested += _section(sections[0], key)
            continue
        default = "" if info.is_required() or sections else f"`{info.get_default(call_default_factory=True)!r}`"
        kind = "one of the sections below" if sections else f"`{_type_name(info.annotation)}`"
        lines.append(f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(info.description or '')} |")
        for found in sections:
            tag = found.__pydantic_fields__.get("type")  # type: ignore[attr-defined]
            nested += _section(found, f"{key}[{get_args(tag.annotation)[0]}]" if tag is not None else f"{key}[]")
    return [*lines, "", *nested]


def _sections_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and is_dataclass(annotation):
        yield annotation
        return
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type_name(get_args(annotation)[0])
    if origin is Literal:
        return " or ".join(str(value) or "nothing" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in get_args(annotation))
    if origin is tuple:
        return f"list of {_type_name(get_args(annotation)[0])}"
    if origin is dict:
        return "mapping"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _plain(text: str | None) -> str:
    return " ".join((text or "").replace("``", "`").split())


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")
