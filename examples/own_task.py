"""An own evaluation task: charts whose bars are to be read, scored with a tolerance.

Draws the charts, writes the questions as records and a task file that names the scorer below; then any checkpoint can
be asked, with the module on PYTHONPATH::

    python examples/own_task.py data/charts
    PYTHONPATH=examples llava-scale eval runs/first/final --tasks data/charts/charts.yaml --out runs/first/charts

For a task of your own, write records as in ``records.json`` and replace the scorer.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from llava_scale.eval.own_scorers import scorer

if TYPE_CHECKING:
    from collections.abc import Sequence

COLORS = ("red", "green", "blue", "orange")
TOLERANCE = 0.05
TASK = """\
name: charts
data: records.json
prompt: "{question}\\nAnswer with a number."
scorer: own_task:close_enough
max_new_tokens: 8
"""


@scorer
def close_enough(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 for a number within 5 % of a right one, else 0 (the relaxed accuracy of ChartQA, arXiv:2203.10244)."""
    return [
        float(any(_is_close(answer, gold) for gold in golds)) for answer, golds in zip(answers, references, strict=True)
    ]


def _is_close(answer: str, gold: str) -> bool:
    try:
        value, wanted = float(answer.strip().rstrip("%.")), float(gold)
    except ValueError:
        return answer.strip().lower() == gold.lower()
    return abs(value - wanted) <= TOLERANCE * abs(wanted)


def write_charts(folder: Path, *, number: int = 24, seed: int = 0) -> Path:
    """Write ``number`` charts, their records and the task file into ``folder``; return the task file."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for place in range(number):
        values = [rng.randrange(5, 100, 5) for _ in COLORS]
        name = f"chart-{place:03d}.png"
        draw_chart(values).save(folder / name)
        asked = rng.randrange(len(COLORS))
        question = f"How high is the {COLORS[asked]} bar?"
        records.append({"id": f"chart-{place}", "image": name, "question": question, "answers": [str(values[asked])]})
    (folder / "records.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    task = folder / "charts.yaml"
    task.write_text(TASK, encoding="utf-8")
    return task


def draw_chart(values: Sequence[int]) -> Image.Image:
    """A bar for each value, 0 to 100, with lines at 0, 50 and 100."""
    picture = Image.new("RGB", (160, 120), "white")
    pen = ImageDraw.Draw(picture)
    for level in (0, 50, 100):
        pen.line((0, 110 - level, 160, 110 - level), fill="lightgrey")
    for place, (value, color) in enumerate(zip(values, COLORS, strict=True)):
        pen.rectangle((15 + 36 * place, 110 - value, 35 + 36 * place, 110), fill=color)
    return picture


if __name__ == "__main__":
    print(write_charts(Path(sys.argv[1])))
