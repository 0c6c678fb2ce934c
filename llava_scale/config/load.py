"""Read, change, check, print and save a config."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from llava_scale.config.train import Config
from llava_scale.errors import ConfigError, suggest

if TYPE_CHECKING:
    from collections.abc import Iterable


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
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
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
        value = yaml.safe_load(text)
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
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        known = _fields_at(problem["loc"][:-1])
        return f"unknown key {place!r}; {suggest(str(problem['loc'][-1]), known)}"
    shown = problem.get("input")
    return f"{place}: {problem['msg']}, got {shown!r}"


def _fields_at(location: tuple[str | int, ...]) -> list[str]:
    """Names of the fields of the section at ``location``, following lists into their items."""
    node: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        node = _section_of(get_type_hints(node).get(part))
        if node is None:
            return []
    return [item.name for item in dataclasses.fields(node)]


def _section_of(annotation: Any) -> Any:
    if dataclasses.is_dataclass(annotation):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_of(inner)
        if found is not None:
            return found
    return None
