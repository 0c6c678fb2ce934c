"""Model cards: what a checkpoint was made of, how, and how good it is, as ``README.md`` and ``card.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llava_scale import __version__
from llava_scale.config import to_dict
from llava_scale.errors import CheckpointError

if TYPE_CHECKING:
    from llava_scale.config import Config

CARD = "card.json"

_USE = {
    "": "llava-scale chat FOLDER --image PICTURE 'QUESTION'",
    "llava": "the original LLaVA's `load_pretrained_model`, or `llava-scale import FOLDER OUT`",
    "transformers": "`LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained`",
    "gguf": "`llama-mtmd-cli -m language-model-*.gguf --mmproj mmproj-*.gguf`",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One training run.

    Attributes:
        name: Its name, and its recipe's stage.
        data: Path and samples' weight of each source.
        steps: Optimizer steps.
        settings: The resolved config.
        results: Last loss, held-out loss and further numbers by name.
    """

    name: str
    data: list[dict[str, Any]]
    steps: int
    settings: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What is known of a checkpoint.

    Attributes:
        parts: Vision tower, language model, projector, compressor: their names.
        licences: Of each part, as its own card states them; parts without a statement are left out.
        stages: Training runs, oldest first.
        scores: Tasks and their scores, from an evaluation beside the run.
    """

    parts: dict[str, str] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    scores: dict[str, Any] = field(default_factory=dict)


def card_of_run(config: Config, *, steps: int, results: Mapping[str, Any]) -> ModelCard:
    """The card of a run's model; a run that continued from a checkpoint continues its card."""
    before = read_card(Path(config.model.init_from)) if config.model.init_from else ModelCard()
    stage = Stage(
        name=f"{config.name} ({config.train.stage})",
        data=[{"path": source.path, "weight": source.weight} for source in config.data.sources],
        steps=steps,
        settings=to_dict(config),
        results={name: value for name, value in results.items() if value is not None},
    )
    parts = before.parts or _parts(config)
    licences = {**before.licences, **_licences(parts, [source.path for source in config.data.sources])}
    return replace(before, parts=parts, licences=licences, stages=(*before.stages, stage))


def read_card(folder: Path) -> ModelCard:
    """The card of a checkpoint, with the scores of an evaluation that lies beside it; empty where it has none.

    Raises:
        CheckpointError: ``card.json`` cannot be read.
    """
    path = folder / CARD
    card = ModelCard()
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            stages = tuple(Stage(**stage) for stage in fields.pop("stages"))
            card = ModelCard(stages=stages, **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is no model card ({error}); remove it to export without") from None
    return replace(card, scores={**card.scores, **_scores(folder)})


def write_card(folder: Path, card: ModelCard, *, layout: str = "") -> None:
    """Write ``README.md`` and, for checkpoints of ours, ``card.json``.

    Args:
        folder: Of the model.
        card: What is known.
        layout: Format of the model; empty for ours.
    """
    (folder / "README.md").write_text(render_card(card, layout=layout), encoding="utf-8")
    if not layout:
        (folder / CARD).write_text(json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def render_card(card: ModelCard, *, layout: str = "") -> str:
    """The card as Markdown with the header that model hubs read."""
    library = {"": "llava-scale", "transformers": "transformers", "gguf": "llama.cpp", "llava": "llava"}[layout]
    header = {"library_name": library, "pipeline_tag": "image-text-to-text", "tags": ["llava", "llava-scale"]}
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        f"# {card.stages[-1].name if card.stages else 'LLaVA-style model'}\n",
        f"Written by llava-scale {__version__}. Use: {_USE[layout]}\n",
        "## Parts\n",
        _table(
            ("part", "name", "licence"),
            [(part, f"`{name}`", _licence(card, part)) for part, name in card.parts.items()],
        ),
        "## Data and stages\n",
        *[_stage(number, stage, card) for number, stage in enumerate(card.stages, start=1)],
        "## Results\n",
        _table(("score", "value"), [(name, _number(value)) for name, value in card.scores.items()]),
        "## Licences\n",
        "This card lists what the parts state of themselves. A model made of them is bound by the terms of its vision "
        "tower, its language model and its training data; where a licence is not stated, ask before you pass it on.\n",
    ]
    return "\n".join(parts)


def _stage(number: int, stage: Stage, card: ModelCard) -> str:
    results = ", ".join(f"{name} {_number(value)}" for name, value in stage.results.items())
    rows = [(f"`{item['path']}`", str(item["weight"]), _licence(card, str(item["path"]))) for item in stage.data]
    settings = yaml.safe_dump(stage.settings, sort_keys=False, allow_unicode=True)
    return (
        f"### {number}. {stage.name}\n\n{stage.steps:,} optimizer steps{'; ' if results else ''}{results}\n\n"
        f"{_table(('data', 'weight', 'licence'), rows)}\n<details><summary>All settings</summary>\n\n"
        f"```yaml\n{settings}```\n\n</details>\n"
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return "Not stated.\n"
    lines = ["| " + " | ".join(row) + " |" for row in (head, tuple("---" for _ in head), *rows)]
    return "\n".join(lines) + "\n"


def _licence(card: ModelCard, part: str) -> str:
    return card.licences.get(part, "not stated")


def _number(value: Any) -> str:
    if isinstance(value, dict) and "value" in value:
        bounds = f" ({value['low']:.3f} to {value['high']:.3f})" if "low" in value else ""
        return f"{value['value']:.4g}{bounds}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parts(config: Config) -> dict[str, str]:
    model = config.model
    preset = f"{model.preset} preset" if model.preset else ""
    compressor = model.compressor.type if model.compressor is not None else "none"
    return {
        "vision tower": model.vision_tower or preset,
        "language model": model.language_model or preset,
        **({"audio tower": model.audio_tower} if model.audio_tower else {}),
        "projector": model.projector.type,
        "compressor": compressor,
    }


def _licences(parts: dict[str, str], data: list[str]) -> dict[str, str]:
    found = {
        part: _stated(Path(parts[part]))
        for part in ("vision tower", "audio tower", "language model")
        if parts.get(part)
    }
    found |= {path: _stated(Path(path)) for path in data}
    return {name: licence for name, licence in found.items() if licence}


def _stated(folder: Path) -> str:
    """Licence in the header of the ``README.md`` of a folder; empty where none is stated."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    return str(header.get("license") or "") if isinstance(header, dict) else ""


def _scores(folder: Path) -> dict[str, Any]:
    """Scores of ``eval/eval.json`` or ``eval/tasks.json`` beside the checkpoint."""
    scores: dict[str, Any] = {}
    for place in (folder / "eval", folder.parent / "eval"):
        for name in ("eval.json", "tasks.json"):
            try:
                found = json.loads((place / name).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if name == "eval.json":
                scores |= {f"exact match, {group}": share for group, share in (found.get("exact_match") or {}).items()}
                scores |= {"held-out loss": found["loss"]} if isinstance(found.get("loss"), float) else {}
            for task in found.get("tasks") or []:
                scores |= {f"{task['name']}: {metric}": score for metric, score in task["scores"].items()}
    return scores
