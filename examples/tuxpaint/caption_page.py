"""A page with the held-out pictures, what the model says of them, and the figures of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_scale.viz.page import number, page, percent, picture, section, text
from llava_scale.viz.scores import tile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from caption_scoring import CaptionScores

NUM_LIKELIEST = 3


def write_caption_page(
    target: Path,
    *,
    summary: Mapping[str, object],
    scores: CaptionScores,
    pictures: Sequence[bytes],
    answers: Sequence[str],
) -> None:
    """Write one HTML file with everything in it.

    Args:
        target: The file.
        summary: As in ``summary.json``.
        scores: Of all held-out captions.
        pictures: JPEG of each held-out sample, in the order of ``scores``.
        answers: What the model said of each, as it came.
    """
    ranks = scores.corrected_ranks
    cards = []
    for place, (data, answer) in enumerate(zip(pictures, answers, strict=True)):
        image = picture(data, mime="image/jpeg", alt=scores.keys[place])
        likeliest = " / ".join(scores.best(NUM_LIKELIEST, place))
        cards.append(_card(image, answer, scores.captions[place], likeliest, ranks[place]))
    note = (
        "Every held-out picture, in the order of the data set, with the model's caption as it came. No picture of the "
        "same thing, series or wording was trained on. The rank is that of the true caption among all held-out "
        f"captions; below it are the {NUM_LIKELIEST} that the model finds most telling for the picture."
    )
    body = [
        section("Result", f'<div class="card"><dl class="tiles">{_tiles(summary)}</dl></div>'),
        section("Captions", f'<div class="grid" style="--min:220px">{"".join(cards)}</div>', note=note),
    ]
    content = page(title="Captions of held-out Tux Paint stamps", subtitle=str(target.parent), body=body)
    target.write_text(content, encoding="utf-8")


def _tiles(summary: Mapping[str, object]) -> str:
    shown = [
        tile("held-out loss", number(summary["loss"], digits=4), "nats per supervised token"),
        tile("beside a wrong picture", number(summary["loss_with_wrong_picture"], digits=4), "the same captions"),
    ]
    for name, label in (("ranking", "caption ranking"), ("ranking_corrected", "ranking, corrected")):
        for k in (1, 5):
            chance = f"chance {percent(_share(summary, f'chance_top{k}'))}"
            shown.append(tile(f"{label}, top {k}", percent(_share(summary, f"{name}_top{k}")), chance))
    return "".join(shown)


def _share(summary: Mapping[str, object], key: str) -> float:
    value = summary[key]
    assert isinstance(value, float)
    return value


def _card(image: str, answer: str, caption: str, likeliest: str, rank: int) -> str:
    kind = "good" if rank <= NUM_LIKELIEST else "bad"
    lines = (("model", answer), ("truth", caption), ("likeliest", likeliest))
    rows = "".join(f"<dt>{label}</dt><dd>{text(value)}</dd>" for label, value in lines)
    mark = f'<div class="about"><span class="mark {kind}">rank {rank}</span></div>'
    return f'<div class="card answer"><div class="pictures">{image}</div><dl>{rows}</dl>{mark}</div>'
