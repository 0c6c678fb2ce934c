"""Read, change, check, print and save a config."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from llava_scale.config.train import Config
from llava_scale.errors import ConfigError, suggest

if TYPE_CHECKING:
    from collections.abc import Iterable

_SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?$")


class _Loader(yaml.SafeLoader):
    """YAML in which ``20:23`` is text, as in YAML 1.2; PyYAML itself counts it in sixties and reads 1223."""


_Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", _SIXTIES), *pairs]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read ``path`` (None starts from the defaults) and apply ``key.sub=value`` overrides in order.

    Values of overrides are YAML: ``train.steps=10``, ``data.sources=[{path: shards}]``. Items of a list are
    addressed by their number: ``data.sources.0.weight=2``.

    Raises:
        ConfigError: unreadable file, unknown key (with a suggestion), wrong type, or a value out of range.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, origin=str(path or "defaults"))


def parse_config(tree: dict[str, Any], *, origin: str) -> Config:
    """Check a plain tree (as ``to_dict`` writes it) and return the config; ``origin`` names it in errors."""
    try:
        return TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        problems = "\n  ".join(_explain(problem) for problem in error.errors())
        raise ConfigError(f"{origin}:\n  {problems}") from None


def to_dict(config: object) -> dict[str, Any]:
    """Return the tree as plain dicts, lists and scalars."""
    plain = TypeAdapter(type(config)).dump_python(config, mode="json")
    assert isinstance(plain, dict)
    return plain


def to_yaml(config: object) -> str:
    """Return the tree as YAML in the order of its declaration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved tree where ``load_config`` reads it back equal."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None
    *parents, leaf = key.split(".")
    node: Any = tree
    for part in parents:
        node = node[_slot(node, part, override)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a section")
    node[_slot(node, leaf, override)] = value


def _slot(node: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    """Key of a mapping, or position in a list, that ``part`` of an override's key names."""
    if isinstance(node, dict):
        return part
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override {override!r}: {part!r} is not a position in a list of {len(node)}")
    return int(part)


def _explain(problem: Any) -> str:
    location, context = problem["loc"], problem.get("ctx", {})
    place = ".".join(str(part) for part in _without_tags(location))
    if problem["type"] == "unexpected_keyword_argument":
        known = _fields_at(location[:-1])
        return f"unknown key {place!r}; {suggest(str(location[-1]), known)}"
    if problem["type"] == "union_tag_invalid":
        known = [str(tag).strip("'") for tag in context["expected_tags"].split(", ")]
        return f"{place}.type: unknown {place.rpartition('.')[2]} {context['tag']!r}; {suggest(context['tag'], known)}"
    if problem["type"] == "union_tag_not_found":
        return f"{place}: say which with a type, for example {place}={{type: ...}}, got {problem.get('input')!r}"
    shown = problem.get("input")
    return f"{place}: {problem['msg']}, got {shown!r}"


def _fields_at(location: tuple[str | int, ...]) -> list[str]:
    """Names of the fields of the section at ``location``."""
    sections = _walk(location)[-1]
    return [item.name for item in dataclasses.fields(sections[0])] if len(sections) == 1 else []


def _without_tags(location: tuple[str | int, ...]) -> list[str | int]:
    """``location`` as people write it: without the types that choose one of several sections."""
    before = _walk(location)
    return [part for part, sections in zip(location, before, strict=False) if not _is_choice(sections)]


def _walk(location: tuple[str | int, ...]) -> list[list[Any]]:
    """Sections that could stand at each place before a part of ``location``, and after the last."""
    found: list[list[Any]] = [[Config]]
    for part in location:
        sections = found[-1]
        if isinstance(part, int):
            found.append(sections)
        elif _is_choice(sections):
            found.append([section for section in sections if part in get_args(get_type_hints(section)["type"])])
        else:
            hints = get_type_hints(sections[0]) if sections else {}
            found.append(_sections_of(hints.get(part)))
    return found


def _is_choice(sections: list[Any]) -> bool:
    return len(sections) > 1


def _sections_of(annotation: Any) -> list[Any]:
    if dataclasses.is_dataclass(annotation):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_of(inner)]
