"""Tables and figures of the study of compressors, from the folders of its runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from common import table
from study_questions import GROUPS

from llava_scale.viz.curves import COLOURS, Panel, draw_overview, new_figure, to_png
from llava_scale.viz.runs import read_run

SHOWN_CURVES = (
    "base",
    "merge_r25",
    "merge_r50",
    "merge_r50_no_ramp",
    "original_r50",
    "original_r50_no_ramp",
    "qformer",
    "qformer_r50",
)
"""The original's runs, as its figures have them."""


@dataclass(frozen=True)
class Run:
    """Results of one run over its seeds.

    Attributes:
        name: As in ``configs/study``.
        results: ``result.json`` of each seed.
        folders: Of each seed.
    """

    name: str
    results: list[dict[str, Any]]
    folders: list[Path]

    def mean(self, key: str) -> float:
        """Mean over the seeds."""
        return mean(result[key] for result in self.results)

    def spread(self, key: str) -> str:
        """``mean (lowest to highest)``."""
        values = [result[key] for result in self.results]
        shown = f"{mean(values):.3f}"
        return shown if len(values) == 1 else f"{shown} ({min(values):.3f} to {max(values):.3f})"

    @property
    def losses(self) -> dict[str, float]:
        """Held-out loss by the name of its seed's folder."""
        return {folder.parent.name: result["loss"] for folder, result in zip(self.folders, self.results, strict=True)}

    def against(self, base: Run) -> str:
        """Mean difference of the loss to ``base`` over the seeds that both have, ``(lowest to highest)``."""
        of_base = base.losses
        found = [loss - of_base[seed] for seed, loss in self.losses.items() if seed in of_base]
        if not found:
            return ""
        shown = f"{mean(found):+.3f}"
        return shown if len(found) == 1 or self is base else f"{shown} ({min(found):+.3f} to {max(found):+.3f})"

    def share(self, tasks: list[str]) -> tuple[int, int]:
        """Right answers and questions of some tasks, over all seeds."""
        counts = [result["tasks"][task] for result in self.results for task in tasks]
        return sum(right for right, _ in counts), sum(total for _, total in counts)


def read_study(folder: Path) -> list[Run]:
    """Runs that have been finished with at least one seed, in the order of the tokens that they leave."""
    names: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("seed*/*/result.json")):
        names.setdefault(path.parent.name, []).append(path.parent)
    runs = [
        Run(name, [json.loads((path / "result.json").read_text()) for path in paths], paths)
        for name, paths in names.items()
    ]
    return sorted(runs, key=lambda run: (-run.mean("tokens"), run.mean("loss")))


def table_of(runs: list[Run]) -> str:
    """Markdown table of a study."""
    base = next((run for run in runs if run.name == "base"), None)
    asked, ranked = ("tasks" in runs[0].results[0], "top1" in runs[0].results[0])
    scores = [*GROUPS, "all questions"] if asked else ["caption first", "among five"] if ranked else []
    header = ["run", "tokens", "held-out loss", "against base", *scores, "seeds"]
    lines = []
    for run in runs:
        against = run.against(base) if base else ""
        shown = _scores(run) if asked else [f"{run.mean(key):.1%}" for key in ("top1", "top5")] if ranked else []
        lines.append(
            [run.name, f"{run.mean('tokens'):.0f}", run.spread("loss"), against, *shown, f"{len(run.results)}"]
        )
    return table(header, lines)


def _scores(run: Run) -> list[str]:
    shares = [run.share(list(tasks)) for tasks in GROUPS.values()]
    shares.append(run.share([task for tasks in GROUPS.values() for task in tasks]))
    return [f"{right / total:.1%}" for right, total in shares]


def task_table(runs: list[Run]) -> str:
    """Markdown table of each task."""
    tasks = [task for group in GROUPS.values() for task in group]
    lines = []
    for run in runs:
        shares = [run.share([task]) for task in tasks]
        lines.append([run.name, *(f"{right / total:.0%}" for right, total in shares)])
    return table(["run", *tasks], lines)


def draw_losses(runs: list[Run], title: str) -> bytes:
    """PNG: held-out loss over the tokens that are left; a dot for each seed, a name at their mean."""
    figure = new_figure(8.6, 5.6)
    axes = figure.add_subplot()
    counts = sorted({run.mean("tokens") for run in runs}, reverse=True)
    for number, count in enumerate(counts):
        group = sorted((run for run in runs if run.mean("tokens") == count), key=lambda run: run.mean("loss"))
        for place, run in enumerate(group):
            x = number + (place - (len(group) - 1) / 2) * min(0.8 / max(len(group), 1), 0.16)
            colour = _colour(run.name)
            losses = [result["loss"] for result in run.results]
            axes.plot([x] * len(losses), losses, "-o", color=colour, markersize=3.5, linewidth=1.2)
            axes.annotate(run.name, (x, max(losses)), rotation=90, fontsize=6.5, color=colour, ha="center", va="bottom",
                          xytext=(0, 4), textcoords="offset points")  # fmt: skip
    axes.set_yscale("log")  # what does not learn would flatten the rest
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:.3g}")
    axes.set_xticks(range(len(counts)), [f"{count:.0f} tokens" for count in counts], fontsize=8)
    axes.set_title(title, loc="left", fontsize=10, color="#1b1f24")
    axes.set_ylabel("held-out loss, nats a supervised token", fontsize=8, color="#5b6472")
    axes.margins(y=0.28)  # room for the names
    axes.grid(axis="y", which="both", color="#e6e8ec", linewidth=0.8)
    axes.tick_params(which="both", labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return to_png(figure)


def _colour(name: str) -> str:
    kinds = ("base", "merge", "original", "qformer", "random", "uniform", "image")
    return next((COLOURS[place] for place, kind in enumerate(kinds) if name.startswith(kind)), COLOURS[7])


def draw_curves(runs: list[Run]) -> bytes:
    """PNG: training loss and visual tokens of the original's runs, first seed."""
    by_name = {run.name: run for run in runs}
    records = [read_run(by_name[name].folders[0], name=name) for name in SHOWN_CURVES if name in by_name]
    panels = [
        Panel(key="loss", title="Training loss", unit="nats per supervised token", smooth=True, from_zero=False),
        Panel(key="visual_per_sample", title="Visual tokens of a sample", unit="after compression"),
    ]
    return draw_overview(panels, records)


def insert(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the marks of ``name`` in a page; at its end where there are none yet."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    known = page.read_text() if page.exists() else "# Compressors at equal token counts\n"
    before, found, rest = known.partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    page.write_text(f"{before if found else before + chr(10)}{begin}\n\n{text}\n{end}{after}")


def write_results(runs_folder: Path, results: Path) -> None:
    """Write tables of every study in ``runs_folder`` into ``compression.md`` in ``results``, figures beside it.

    Text around the tables stays as it is. The tables are printed too.
    """
    results.mkdir(parents=True, exist_ok=True)
    for name, title in (("synthetic", "Synthetic pictures"), ("tuxpaint", "Tux Paint's stamps")):
        runs = read_study(runs_folder / name)
        if not runs:
            continue
        text = f"{table_of(runs)}\n"
        if "tasks" in runs[0].results[0]:
            text += f"\n{task_table(runs)}\n"
        insert(results / "compression.md", name, text)
        (results / f"compression-{name}.png").write_bytes(draw_losses(runs, title))
        (results / f"compression-{name}-curves.png").write_bytes(draw_curves(runs))
        print(f"{title}\n\n{text}")
