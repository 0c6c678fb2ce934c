"""Training curves of several runs as PNG pictures (extra ``[plot]``)."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from llava_scale.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava_scale.viz.runs import Points, RunRecord

COLOURS = ("#2563eb", "#e0662b", "#129070", "#a13fc0", "#c31d4b", "#7a6a12", "#0e8fb3", "#6b6f76")
"""Colour of the first, second, ... run; told apart by readers with any colour vision, on white."""

_OF_COMPRESSION = ("removed", "visual_per_sample")  # of no interest where all tokens stay
_STYLES = ("-", "--", ":", "-.")
_SMOOTH_FROM = 40
_COUNTS = ("eval/tokens", "eval/samples", "eval/seconds")  # of the evaluation itself, no scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One diagram: a key of the log, drawn for every run that has it.

    Attributes:
        key: Key of the log.
        title: Heading.
        unit: What the y axis counts.
        smooth: Draw a smoothed line over the faint raw one.
        from_zero: The y axis begins at zero, so that heights compare.
        also: Second key of the log, drawn dotted in the run's colour.
    """

    key: str
    title: str
    unit: str
    smooth: bool = False
    from_zero: bool = True
    also: str = ""


PANELS = (
    Panel(key="loss", title="Training loss", unit="nats per supervised token", smooth=True, from_zero=False),
    Panel(key="eval/loss", title="Held-out loss", unit="nats per supervised token", from_zero=False),
    Panel(key="lr", title="Learning rate", unit="peak of all groups"),
    Panel(key="tokens_per_s", title="Tokens per second", unit="text and media tokens", smooth=True),
    Panel(key="samples_per_s", title="Samples per second", unit="samples", smooth=True),
    Panel(key="seconds", title="Runtime", unit="seconds in training steps"),
    Panel(
        key="visual_per_sample",
        title="Visual tokens of a sample",
        unit="after compression; dotted: before it",
        also="visual_before_per_sample",
    ),
    Panel(key="removed", title="Compression in force", unit="share of the visual tokens that is taken away"),
    Panel(key="grad_norm", title="Gradient norm", unit="before clipping", smooth=True),
    Panel(key="data_wait", title="Waiting for data", unit="share of the time"),
)
"""Diagrams in their order; a held-out score ``eval/x`` without an entry gets one of its own after the held-out loss."""


def panels_of(runs: Sequence[RunRecord]) -> list[Panel]:
    """Return the diagrams for which at least one run has points."""
    logged = {key: None for run in runs for key, points in run.curves.items() if points}
    if not any(value for run in runs for _, value in run.curves.get("removed", [])):
        logged = {key: None for key in logged if key not in _OF_COMPRESSION}
    known = {panel.key for panel in PANELS}
    scores = [
        Panel(key=key, title=f"Held-out {key.removeprefix('eval/').replace('_', ' ')}", unit="score")
        for key in logged
        if key.startswith("eval/") and key not in known and key not in _COUNTS
    ]
    ordered = [*PANELS[:2], *scores, *PANELS[2:]]
    return [panel for panel in ordered if panel.key in logged]


def draw_panel(panel: Panel, runs: Sequence[RunRecord]) -> bytes:
    """PNG of one diagram, 1120 pixels wide.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(5.6, 3.3)
    _draw(figure.add_subplot(), panel, runs)
    return to_png(figure)


def draw_overview(panels: Sequence[Panel], runs: Sequence[RunRecord]) -> bytes:
    """PNG of all diagrams in one picture, two beside each other.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows = math.ceil(len(panels) / 2)
    figure = new_figure(11.2, 3.3 * max(rows, 1))
    for i, panel in enumerate(panels):
        _draw(figure.add_subplot(rows, 2, i + 1), panel, runs)
    return to_png(figure)


def smoothed(points: Points) -> Points:
    """Centred running mean (triangle over a fifteenth of the points on each side), so that the line does not lag."""
    half = max(1, len(points) // 15)
    line = []
    for i, (step, _) in enumerate(points):
        first = max(0, i - half)
        near = [(half + 1 - abs(i - j), points[j][1]) for j in range(first, min(len(points), i + half + 1))]
        total = sum(weight for weight, _ in near)
        line.append((step, sum(weight * value for weight, value in near) / total))
    return line


def _draw(axes: Any, panel: Panel, runs: Sequence[RunRecord]) -> None:
    drawn = []
    for i, run in enumerate(runs):
        points = run.curves.get(panel.key)
        if not points:
            continue
        colour, style = COLOURS[i % len(COLOURS)], _STYLES[i // len(COLOURS) % len(_STYLES)]
        marker = "o" if len(points) < _SMOOTH_FROM // 2 else None
        is_smoothed = panel.smooth and len(points) >= _SMOOTH_FROM
        if is_smoothed:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.7, alpha=0.28)
        line = smoothed(points) if is_smoothed else points
        axes.plot(
            *zip(*line, strict=True), color=colour, linestyle=style, marker=marker, markersize=3, linewidth=1.7,
            label=run.name,
        )  # fmt: skip
        if also := run.curves.get(panel.also):
            axes.plot(*zip(*also, strict=True), color=colour, linestyle=":", linewidth=1.1, alpha=0.8)
        drawn.append(points)
    _dress(axes, panel, drawn)


def _dress(axes: Any, panel: Panel, drawn: list[Points]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", color="#1b1f24", pad=20)
    axes.text(0, 1.035, panel.unit, transform=axes.transAxes, fontsize=8.5, color="#5b6472")
    axes.set_xlabel("optimizer step", fontsize=8.5, color="#5b6472")
    axes.tick_params(labelsize=8.5, colors="#3d4550", length=0)
    axes.grid(axis="y", color="#e6e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b8bec7")
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    elif panel.smooth:
        _cut_first_peak(axes, drawn)
    if len(drawn) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor="#3d4550")


def _cut_first_peak(axes: Any, drawn: list[Points]) -> None:
    """End the y axis a little above what comes after the first tenth: the first steps would flatten the rest."""
    later = [value for points in drawn for _, value in points[len(points) // 10 :]]
    every = [value for points in drawn for _, value in points]
    span = max(later) - min(later)
    if span > 0 and max(every) > max(later) + span:
        axes.set_ylim(min(later) - 0.05 * span, max(later) + 0.35 * span)


def draw_bars(runs: Sequence[RunRecord]) -> bytes | None:
    """PNG of runtime, samples a second and visual tokens of a sample as one bar a run; None where nothing is known.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    known = [(title, values) for title, values in _totals(runs) if any(values)]
    if not known:
        return None
    figure = new_figure(11.2, 0.9 + 0.32 * len(runs))
    for axes, (title, values) in zip(figure.subplots(1, len(known), squeeze=False)[0], known, strict=True):
        places = range(len(runs))
        axes.barh(places, values, color=[COLOURS[i % len(COLOURS)] for i in places], height=0.66)
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f" {value:,.0f}" if value >= 10 else f" {value:.2g}", va="center", fontsize=8.5)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#1b1f24")
        axes.set_yticks(
            places, [run.name for run in runs] if axes.get_subplotspec().is_first_col() else [""] * len(runs)
        )
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.margins(x=0.22)
        axes.tick_params(labelsize=8.5, colors="#3d4550", length=0)
        for side in ("top", "right", "bottom"):
            axes.spines[side].set_visible(False)
    return to_png(figure)


def _totals(runs: Sequence[RunRecord]) -> list[tuple[str, list[float]]]:
    speed = [median([value for _, value in run.curves.get("samples_per_s", [])] or [0.0]) for run in runs]
    tokens = [run.curves["visual_per_sample"][-1][1] if run.curves.get("visual_per_sample") else 0.0 for run in runs]
    return [
        ("Runtime in seconds", [float(run.last.get("seconds", 0.0)) for run in runs]),
        ("Samples per second", speed),
        ("Visual tokens of a sample, at the end", tokens),
    ]


def new_figure(width: float, height: float) -> Any:
    """Empty matplotlib figure in our style, in inches at 200 dots an inch.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot") from None
    figure = Figure(figsize=(width, height), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
