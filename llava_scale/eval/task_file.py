"""Task files: which data, how it is asked, and how answers are scored, as YAML.

::

    name: signs
    data: shards/signs            # shards, or a .json/.jsonl file of records
    prompt: "{question}\\nAnswer with one word."
    scorer: vqa_accuracy
    max_new_tokens: 16
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from llava_scale.config import to_dict
from llava_scale.config.base import section
from llava_scale.errors import ConfigError, suggest
from llava_scale.eval.own_scorers import find_scorer

GENERATED = ("exact_match", "vqa_accuracy", "anls", "cider", "bleu")
CHOSEN = ("multiple_choice", "ranking")
SCORERS = (*GENERATED, *CHOSEN)

_RESPONSE_FIELDS = ("prompt", "max_new_tokens", "scorer_kind", "answer_with", "candidates", "seed")


@section
class TaskConfig:
    """One task."""

    data: str
    """Folder, URL or ``.tar`` of shards, or a ``.json``/``.jsonl`` file; relative to the task file."""
    scorer: str
    """``exact_match``, ``vqa_accuracy``, ``anls``, ``cider``, ``bleu``, ``multiple_choice`` or ``ranking``; or
    ``package.module:function`` of your own (see ``eval.own_scorers``)."""
    name: str = ""
    """Name in results; the file's name without ending if empty."""
    prompt: str = ""
    """Text of the question with ``{question}``, ``{choices}`` and any field of the record; the question if empty."""
    media_root: str = ""
    """Folder of the media of a JSON file; the file's own if empty."""
    where: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Only samples whose fields have these values."""
    limit: Annotated[int, Field(ge=0)] = 0
    """Most samples, spread evenly; 0 takes all."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest answer in tokens."""
    candidates: Annotated[int, Field(ge=2)] = 8
    """``ranking``: captions that each is ranked among, its own included."""
    answer_with: Literal["text", "letter"] = "text"
    """``multiple_choice``: whether the likelihood of a choice's text or of its letter is compared."""
    normalise: Literal["mean", "sum"] = "mean"
    """``multiple_choice`` and ``ranking``: log-likelihood of an answer by token or as a whole."""
    examples: Annotated[int, Field(ge=0)] = 24
    """Answers kept with their pictures."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draw of candidates."""

    def __post_init__(self) -> None:
        if ":" in self.scorer:
            find_scorer(self.scorer)
        elif self.scorer not in SCORERS:
            raise ConfigError(f"scorer: unknown {self.scorer!r}; {suggest(self.scorer, SCORERS)}")

    @property
    def is_generated(self) -> bool:
        """Whether answers are written (and not chosen)."""
        return self.scorer in GENERATED or ":" in self.scorer

    def response_digest(self) -> str:
        """Changes whenever the same sample could be answered otherwise."""
        fields = {**to_dict(self), "scorer_kind": "generated" if self.is_generated else self.scorer}
        kept = {name: fields[name] for name in _RESPONSE_FIELDS}
        return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()


def load_task(path: str | Path) -> TaskConfig:
    """Read a task file; paths in it become paths from here.

    Raises:
        ConfigError: no such file, an unknown field (with a suggestion), or a value out of range.
    """
    file = Path(path)
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read task file {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no YAML: {error}") from None
    task = parse_task(tree, origin=str(file))
    return replace(
        task,
        name=task.name or file.stem,
        data=_from_here(task.data, file.parent),
        media_root=_from_here(task.media_root, file.parent) if task.media_root else "",
    )


def parse_task(tree: Any, *, origin: str) -> TaskConfig:
    """Check a plain tree and return the task; ``origin`` names it in errors."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: a task file holds fields such as data and scorer")
    known = TaskConfig.__dataclass_fields__
    for name in tree:
        if name not in known:
            raise ConfigError(f"{origin}: unknown field {name!r}; {suggest(str(name), known)}")
    try:
        return TypeAdapter(TaskConfig).validate_python(tree)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"{origin}: {'; '.join(problems)}") from None
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _from_here(path: str, folder: Path) -> str:
    return path if "://" in path or Path(path).is_absolute() else str(folder / path)
