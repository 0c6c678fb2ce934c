"""``report.html``: curves, scores, settings and answers of one or several runs beside each other."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from llava_scale.errors import ConfigError
from llava_scale.viz.curves import COLOURS, draw_bars, draw_overview, draw_panel, panels_of
from llava_scale.viz.page import dot, duration, number, page, percent, picture, section, text
from llava_scale.viz.runs import differing_settings, distinct_names, read_run
from llava_scale.viz.scores import answers_section, results_of, scores_section, tile, tiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava_scale.viz.runs import RunRecord


def write_report(runs: Sequence[str | Path | RunRecord], out: str | Path, *, title: str = "") -> Path:
    """Write ``report.html`` (one file, pictures inside) and the curves as PNG into ``out``.

    Args:
        runs: Run folders, or records from :func:`llava_scale.viz.runs.read_run`; colours follow this order.
        out: Folder for ``report.html``, ``curves.png`` (all diagrams), ``curve-<key>.png`` (each one) and, of several
            runs, ``runs.png`` (runtime, speed and tokens as bars).
        title: Heading; the run's name, or ``N runs``, if empty.

    Returns:
        Path of ``report.html``.

    Raises:
        ConfigError: no run was given, or ``out`` cannot be written.
        CheckpointError: a folder is not a run, or one of its files cannot be read.
        MissingExtraError: matplotlib is not installed.
    """
    if not runs:
        raise ConfigError("a report needs at least one run folder")
    records = distinct_names([read_run(run) if isinstance(run, str | Path) else run for run in runs])
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        charts = _write_curves(records, folder)
        body = [
            _glance(records),
            _side_by_side(records, folder),
            scores_section([(run.name, results_of(run)) for run in records]),
            charts,
            _settings(records),
            *_answers(records),
        ]
        heading = title or (records[0].name if len(records) == 1 else f"{len(records)} runs")
        subtitle = f"Training report · {datetime.now().astimezone().strftime('%Y-%m-%d %H:%M')}"
        target = folder / "report.html"
        target.write_text(page(title=heading, subtitle=subtitle, body=[part for part in body if part]), "utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report into {folder}: {error.strerror}; choose another --out") from None
    return target


def _write_curves(runs: list[RunRecord], folder: Path) -> str:
    panels = panels_of(runs)
    if not panels:
        return section("Curves", '<p class="soft">The log has no lines yet.</p>')
    figures = []
    for panel in panels:
        data = draw_panel(panel, runs)
        (folder / f"curve-{panel.key.replace('/', '-')}.png").write_bytes(data)
        figures.append(f'<figure class="card">{picture(data, mime="image/png", alt=panel.title)}</figure>')
    (folder / "curves.png").write_bytes(draw_overview(panels, runs))
    return section("Curves", f'<div class="grid">{"".join(figures)}</div>')


def _glance(runs: list[RunRecord]) -> str:
    cards = []
    for i, run in enumerate(runs):
        name = f"<h3>{dot(COLOURS[i % len(COLOURS)])}{text(run.name)}</h3>" if len(runs) > 1 else ""
        cards.append(
            f'<div class="card">{name}<dl class="tiles">{tiles(results_of(run))}{_training(run)}</dl>'
            f'<div class="soft" style="margin-top:12px;overflow-wrap:anywhere">{text(run.path)}</div></div>'
        )
    width = "100%" if len(runs) == 1 else "440px"
    return section("At a glance", f'<div class="grid" style="--min:{width}">{"".join(cards)}</div>')


def _side_by_side(runs: list[RunRecord], folder: Path) -> str:
    """Table and bars of what the runs cost and gave, each against the first."""
    if len(runs) < 2:
        return ""
    head = ("run", "training loss", "held-out loss", "runtime", "samples/s", "against the first", "visual tokens of a "
            "sample", "taken away")  # fmt: skip
    first = _median(runs[0], "samples_per_s")
    rows = []
    for i, run in enumerate(runs):
        speed = _median(run, "samples_per_s")
        cells = (
            f"{dot(COLOURS[i % len(COLOURS)])}{text(run.name)}",
            number(_tail_loss(run), digits=4),
            number(results_of(run).get("loss") or _last(run, "eval/loss"), digits=4),
            duration(run.last["seconds"]) if "seconds" in run.last else "–",
            number(speed),
            f"{speed / first:.2f}×" if first and speed else "–",
            _tokens(run),
            percent(_last(run, "removed") or 0.0),
        )
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    table = "".join(f"<tr>{row}</tr>" for row in ("".join(f"<th>{text(name)}</th>" for name in head), *rows))
    bars = draw_bars(runs)
    shown = ""
    if bars is not None:
        (folder / "runs.png").write_bytes(bars)
        image = picture(bars, mime="image/png", alt="Runtime, speed and tokens")
        shown = f'<figure class="card" style="margin-top:16px">{image}</figure>'
    return section("Side by side", f'<div class="card scroll"><table>{table}</table></div>{shown}')


def _tokens(run: RunRecord) -> str:
    before, after = _last(run, "visual_before_per_sample"), _last(run, "visual_per_sample")
    if before is None or after is None:
        return "–"
    return number(after) if before == after else f"{number(before)} to {number(after)}"


def _last(run: RunRecord, key: str) -> float | None:
    points = run.curves.get(key)
    return points[-1][1] if points else None


def _median(run: RunRecord, key: str) -> float | None:
    values = [value for _, value in run.curves.get(key, [])]
    return median(values) if values else None


def _tail_loss(run: RunRecord) -> float | None:
    """Mean of the last tenth of the training losses."""
    losses = run.curves.get("loss", [])
    tail = [value for _, value in losses[-max(1, len(losses) // 10) :]]
    return sum(tail) / len(tail) if tail else None


def _training(run: RunRecord) -> str:
    """What the log says about a run, as tiles."""
    if not run.last:
        return ""
    shown = [tile("steps", number(run.last["step"]))]
    loss = _tail_loss(run)
    if loss is not None:
        shown.append(tile("training loss", number(loss, digits=4), "mean of the last tenth"))
    if not results_of(run).get("loss") and run.curves.get("eval/loss"):
        shown.append(tile("held-out loss", number(run.curves["eval/loss"][-1][1], digits=4), "last in the log"))
    for key, label in (("samples", "samples seen"), ("skipped", "samples skipped")):
        if key in run.last:
            shown.append(tile(label, number(run.last[key])))
    for key, label in (("tokens_per_s", "tokens/s"), ("samples_per_s", "samples/s")):
        value = _median(run, key)
        if value is not None:
            shown.append(tile(label, number(value), "median"))
    if "seconds" in run.last:
        shown.append(tile("time in training", duration(run.last["seconds"])))
    return "".join(shown)


def _settings(runs: list[RunRecord]) -> str:
    parts = []
    if len(runs) > 1:
        rows = differing_settings(runs)
        head = "".join(f"<th>{dot(COLOURS[i % len(COLOURS)])}{text(run.name)}</th>" for i, run in enumerate(runs))
        body = "".join(
            f"<tr><td><code>{text(key)}</code></td>"
            + "".join(f"<td><code>{text(_setting(value))}</code></td>" for value in values)
            + "</tr>"
            for key, values in rows.items()
        )
        parts.append(
            f'<div class="card scroll"><table><tr><th>differs in</th>{head}</tr>{body}</table></div>'
            if rows
            else '<p class="soft">The configs are equal.</p>'
        )
    for run in runs:
        lines = "\n".join(f"{key}: {_setting(value)}" for key, value in run.settings.items())
        if lines:
            parts.append(
                f'<details class="card" style="margin-top:10px"><summary>All settings of {text(run.name)}</summary>'
                f"<pre>{text(lines)}</pre></details>"
            )
    return section("Settings", "".join(parts)) if parts else ""


def _setting(value: Any) -> str:
    return "–" if value is None else '""' if value == "" else str(value)


def _answers(runs: list[RunRecord]) -> list[str]:
    most = 24 if len(runs) == 1 else 8
    return [
        answers_section(
            results_of(run),
            run.evaluation_dir or run.path,
            title="Answers" if len(runs) == 1 else f"Answers of {run.name}",
            most=most,
        )
        for run in runs
    ]
