"""Scores and answers of an evaluation as HTML."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_scale.errors import CheckpointError
from llava_scale.viz.curves import COLOURS
from llava_scale.viz.page import dot, number, page, percent, picture_file, section, text
from llava_scale.viz.runs import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava_scale.viz.runs import RunRecord

Score = dict[str, Any]
"""``value`` with optional ``low``, ``high``, ``correct``, ``total``; a bare number counts as the value."""


def write_evaluation_page(folder: str | Path) -> Path:
    """Write ``eval.html`` from the ``eval.json`` in ``folder``, pictures inside, and return its path.

    Raises:
        CheckpointError: there is no readable ``eval.json``.
    """
    place = Path(folder)
    result = read_json(place / "eval.json")
    if not result:
        raise CheckpointError(f"{place / 'eval.json'} is missing; make it with llava-scale eval")
    named = [(str(result.get("checkpoint", "")), result)]
    body = [
        section("Result", f'<div class="card"><dl class="tiles">{tiles(result)}</dl></div>'),
        scores_section(named),
        answers_section(result, place),
    ]
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    subtitle = f"{result.get('checkpoint', '')} on {result.get('data', '')} · {when}"
    target = place / "eval.html"
    target.write_text(page(title="Evaluation", subtitle=subtitle, body=[part for part in body if part]), "utf-8")
    return target


def results_of(run: RunRecord) -> dict[str, Any]:
    """Final results of a run: its evaluation, completed by what only its summary holds."""
    return {**run.summary, **run.evaluation}


def tiles(result: dict[str, Any]) -> str:
    """Main numbers of an evaluation as ``dt``/``dd`` pairs."""
    shown = []
    if isinstance(result.get("loss"), int | float):
        shown.append(tile("held-out loss", number(result["loss"], digits=4), "nats per supervised token"))
    blind, blind_model, shuffled = (result.get(name) or {} for name in ("blind", "blind_model", "shuffled_frames"))
    for group, score in (result.get("exact_match") or {}).items():
        if group == "overall" and len(result["exact_match"]) == 2:
            continue
        notes = [f"blind {percent(_value(blind[group]))}"] if group in blind else []
        notes += [f"blind model {percent(_value(blind_model[group]))}"] if group in blind_model else []
        notes += [f"frames shuffled {percent(_value(shuffled[group]))}"] if group in shuffled else []
        shown.append(tile(f"exact match, {group}", percent(_value(score)), _about(score, *notes)))
    for k in (1, 5):
        score, chance = _ranking(result, k)
        if score is not None:
            note = f"chance {percent(chance)}" if chance is not None else ""
            shown.append(tile(f"caption ranking, top {k}", percent(_value(score)), _about(score, note)))
    return "".join(shown)


def tile(label: str, value: str, note: str = "") -> str:
    """One number with its label."""
    small = f"<small>{text(note)}</small>" if note else ""
    return f"<div><dt>{text(label)}</dt><dd>{text(value)}{small}</dd></div>"


def scores_section(named: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Bars of exact match per modality and task, one bar a run; empty where nobody has scores."""
    rows = []
    for field, blind in (("exact_match", "blind"), ("by_task", "blind_by_task")):
        groups = {group: None for _, result in named for group in result.get(field) or {}}
        if field == "by_task" and groups:
            rows.append('<h3 style="margin:18px 0 6px">By task</h3>')
        rows += [_score_row(named, field, blind, group) for group in groups]
    if not rows:
        return ""
    legend = '<div class="key">'
    if len(named) > 1:
        legend += "".join(f"<span>{dot(COLOURS[i % len(COLOURS)])}{text(n)}</span>" for i, (n, _) in enumerate(named))
    legend += '<span><i><span class="range" style="left:3px;right:3px;top:5px"></span></i>95 % interval</span>'
    if any(result.get("blind") for _, result in named):
        legend += (
            '<span><i><span class="tick" style="left:11px"></span></i>'
            "blind: most frequent answer to such a question</span>"
        )
    if any(result.get("blind_model") for _, result in named):
        legend += '<span><i><span class="tick model" style="left:11px"></span></i>this model with blank pictures</span>'
    note = "Share of held-out answers equal to the gold answer, upper/lower case and punctuation aside."
    return section("Exact match", f'<div class="card">{legend}</div>{"".join(rows)}</div>', note=note)


def answers_section(result: dict[str, Any], folder: Path | None, *, title: str = "Answers", most: int = 24) -> str:
    """Cards of answered questions with their pictures; empty where the evaluation kept none."""
    examples = (result.get("examples") or [])[:most]
    if not examples:
        return ""
    wrong = sum(not example.get("correct") for example in examples)
    note = f"{wrong} wrong and {len(examples) - wrong} right answers"
    overall = (result.get("exact_match") or {}).get("overall")
    if isinstance(overall, dict) and overall.get("total"):
        missed = overall["total"] - overall["correct"]
        note += f", out of {missed:,} wrong and {overall['correct']:,} right ones"
    note += "; chosen to show both kinds."
    cards = "\n".join(_card(example, folder) for example in examples)
    return section(title, f'<div class="grid" style="--min:270px">{cards}</div>', note=note)


def _card(example: dict[str, Any], folder: Path | None) -> str:
    pictures = "".join(
        picture_file(folder / str(name), alt=f"picture of {example.get('key', '')}")
        for name in example.get("pictures") or ()
        if folder is not None
    )
    right = bool(example.get("correct"))
    mark = f'<span class="mark {"good" if right else "bad"}">{"right" if right else "wrong"}</span>'
    about = " · ".join(text(example[key]) for key in ("task", "key") if example.get(key))
    rows = "".join(
        f"<dt>{label}</dt><dd>{text(example.get(key, ''))}</dd>"
        for label, key in (("question", "question"), ("answer", "answer"), ("gold", "gold"))
        if not (key == "gold" and example.get("gold") == example.get("answer"))
    )
    shown = f'<div class="pictures">{pictures}</div>' if pictures else ""
    return f'<div class="card answer">{shown}<dl>{rows}</dl><div class="about">{mark}{about}</div></div>'


def _score_row(named: Sequence[tuple[str, dict[str, Any]]], field: str, blind: str, group: str) -> str:
    rows: list[str] = []
    for i, (_, result) in enumerate(named):
        score = (result.get(field) or {}).get(group)
        if score is None:
            continue
        label = f'<div class="label{" all" if group == "overall" else ""}">{text(group) if not rows else ""}</div>'
        bar = _bar(_value(score), "fill", COLOURS[i % len(COLOURS)]) + _range(score)
        for key, kind in ((blind, "tick"), (blind.replace("blind", "blind_model"), "tick model")):
            value = (result.get(key) or {}).get(group)
            bar += "" if value is None else f'<span class="{kind}" style="left:{100 * _value(value):.2f}%"></span>'
        count = f" <small>of {score['total']:,}</small>" if isinstance(score, dict) and score.get("total") else ""
        rows.append(
            f'<div class="score">{label}<div class="track">{bar}</div>'
            f'<div class="value">{percent(_value(score))}{count}</div></div>'
        )
    return f'<div class="group">{"".join(rows)}</div>'


def _bar(share: float, kind: str, colour: str) -> str:
    return f'<span class="{kind}" style="width:{100 * share:.2f}%;background:{colour}"></span>'


def _range(score: Score | float) -> str:
    if not isinstance(score, dict) or "low" not in score:
        return ""
    low, high = 100 * score["low"], 100 * score["high"]
    return f'<span class="range" style="left:{low:.2f}%;width:{high - low:.2f}%"></span>'


def _about(score: Score | float, *notes: str) -> str:
    parts = [note for note in notes if note]
    if isinstance(score, dict) and "low" in score:
        parts.insert(0, f"{100 * score['low']:.1f} to {percent(score['high'])}")
    return ", ".join(parts)


def _value(score: Score | float) -> float:
    return float(score["value"]) if isinstance(score, dict) else float(score)


def _ranking(result: dict[str, Any], k: int) -> tuple[Score | float | None, float | None]:
    ranking = result.get("ranking") or {}
    score = ranking.get(f"top{k}", result.get(f"ranking_top{k}"))
    return score, ranking.get(f"chance_top{k}", result.get(f"chance_top{k}"))
