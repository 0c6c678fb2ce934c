"""Scores and answers of task files as HTML."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from llava_scale.errors import CheckpointError
from llava_scale.viz.page import duration, number, page, section, text
from llava_scale.viz.runs import read_json
from llava_scale.viz.scores import answers_section, tile


def write_tasks_page(folder: str | Path) -> Path:
    """Write ``tasks.html`` from the ``tasks.json`` in ``folder``, pictures inside, and return its path.

    Raises:
        CheckpointError: there is no readable ``tasks.json``.
    """
    place = Path(folder)
    result = read_json(place / "tasks.json")
    if not result:
        raise CheckpointError(f"{place / 'tasks.json'} is missing; make it with llava-scale eval --tasks")
    body = [_overview(result["tasks"])]
    for task in result["tasks"]:
        body += [_tiles(task), answers_section(task, place, title=f"Answers, {task['name']}"), _skipped(task)]
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    subtitle = f"{result.get('checkpoint', '')} ({result.get('digest', '')}) · {when}"
    target = place / "tasks.html"
    target.write_text(page(title="Evaluation", subtitle=subtitle, body=[part for part in body if part]), "utf-8")
    return target


def _overview(tasks: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("task", "metric", "score", "95 % interval", "answers", "left out"))
    rows = "".join(
        f"<tr><td>{text(task['name'])}</td><td>{text(metric)}</td><td>{number(score['value'], digits=4)}</td>"
        f"<td>{_interval(score)}</td><td>{number(score['num_items'])}</td><td>{number(len(task['skipped']))}</td></tr>"
        for task in tasks
        for metric, score in task["scores"].items()
    )
    return section("Scores", f'<div class="card scroll"><table><tr>{head}</tr>{rows}</table></div>')


def _tiles(task: dict[str, Any]) -> str:
    shown = "".join(
        tile(metric, number(score["value"], digits=4), f"{_interval(score)} {score['method']}".strip())
        for metric, score in task["scores"].items()
    )
    shown += tile("answers", number(task["num_answers"]), f"{number(task['num_cached'])} from the cache")
    shown += tile("time", duration(task["seconds"]))
    settings = "\n".join(f"{name}: {value}" for name, value in task["settings"].items())
    return section(
        task["name"],
        f'<div class="card"><dl class="tiles">{shown}</dl><details style="margin-top:10px"><summary>Settings</summary>'
        f"<pre>{text(settings)}</pre></details></div>",
        note=f"{task['scorer']} on {task['data']}",
    )


def _skipped(task: dict[str, Any]) -> str:
    if not task["skipped"]:
        return ""
    rows = "".join(
        f"<tr><td>{text(item['shard'])}</td><td>{text(item['key'])}</td><td>{text(item['reason'])}</td></tr>"
        for item in task["skipped"][:100]
    )
    return section(f"Left out, {task['name']}", f'<div class="card scroll"><table>{rows}</table></div>')


def _interval(score: dict[str, Any]) -> str:
    if score["method"] == "exact":
        return ""
    return f"{number(score['low'], digits=4)} to {number(score['high'], digits=4)}"
