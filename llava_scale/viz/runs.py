"""What a finished or running training left behind, read for the report."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from llava_scale.errors import CheckpointError
from llava_scale.training.run_folder import RunFolder, read_lines

Points = list[tuple[int, float]]
"""(optimizer step, value), in the order of the steps."""

_EVALUATIONS = ("eval.json", "eval/eval.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run as the report shows it.

    Attributes:
        name: Name in legends and tables.
        path: Run folder.
        settings: Resolved config, flattened: dotted key -> value.
        curves: Key of the log (``loss``, ``eval/loss`` ...) -> its points; only finite numbers.
        last: Last line of the log that describes training steps.
        summary: ``summary.json`` of the folder, or empty.
        evaluation: ``eval.json`` of the folder, or empty.
        evaluation_dir: Folder that the evaluation's pictures are relative to.
    """

    name: str
    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Points] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    evaluation_dir: Path | None = None


def read_run(path: str | Path, *, name: str = "", evaluation: str | Path | None = None) -> RunRecord:
    """Read a run folder.

    Args:
        path: Folder that holds ``log.jsonl``.
        name: Name in the report; the config's name if empty.
        evaluation: ``eval.json`` of this run; ``eval.json`` or ``eval/eval.json`` in the folder if None.

    Raises:
        CheckpointError: the folder has no log, or one of its files cannot be read.
    """
    folder = RunFolder(Path(path))
    if not folder.log.is_file():
        raise CheckpointError(f"{folder.path} holds no {folder.log.name}; give the folder of a training run")
    settings = dict(_flat(_read_yaml(folder.config)))
    curves, last = _read_log(folder.log)
    found = [Path(evaluation)] if evaluation else [folder.path / place for place in _EVALUATIONS]
    chosen = next((place for place in found if place.is_file()), None)
    if evaluation and chosen is None:
        raise CheckpointError(f"there is no evaluation at {evaluation}; make it with llava-scale eval")
    return RunRecord(
        name=name or str(settings.get("name") or folder.path.name),
        path=folder.path,
        settings=settings,
        curves=curves,
        last=last,
        summary=read_json(folder.path / "summary.json"),
        evaluation=read_json(chosen) if chosen else {},
        evaluation_dir=chosen.parent if chosen else None,
    )


def distinct_names(runs: list[RunRecord]) -> list[RunRecord]:
    """Rename runs that share a name: by their folders, and by number where those are equal too."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.name} ({run.path.name})" if names.count(run.name) > 1 else run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} #{i + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def differing_settings(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs: key -> value per run (None where a run lacks it)."""
    keys = {key: None for run in runs for key in run.settings}
    rows = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds one object; empty where there is no such file.

    Raises:
        CheckpointError: the file is there but is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; remove it or write it anew") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_log(path: Path) -> tuple[dict[str, Points], dict[str, Any]]:
    curves: dict[str, Points] = {}
    last: dict[str, Any] = {}
    for line in read_lines(path):
        if "loss" in line:
            line, last = {**_tokens_of_a_sample(line, last), **line}, line
        for key, value in line.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if key != "step" and is_number and math.isfinite(value):
                curves.setdefault(key, []).append((line["step"], float(value)))
    return curves, last


def _tokens_of_a_sample(line: dict[str, Any], before: dict[str, Any]) -> dict[str, float]:
    """Visual tokens of a sample before and after compression since the line before, for logs that only count them."""
    samples = line.get("samples", 0) - before.get("samples", 0)
    if samples <= 0 or "visual_tokens_before" not in line:
        return {}
    names = {"visual_per_sample": "visual_tokens", "visual_before_per_sample": "visual_tokens_before"}
    return {name: (line[count] - before.get(count, 0)) / samples for name, count in names.items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    return content if isinstance(content, dict) else {}


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves.extend(_flat(value, f"{prefix}{key}."))
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves
