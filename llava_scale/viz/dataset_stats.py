"""What a data set holds: lengths, picture sizes, modalities, turns, and how full its rows would be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from llava_scale.data.packing import TokenPool
from llava_scale.errors import SampleError
from llava_scale.types import MEDIA_KINDS
from llava_scale.viz.curves import COLOURS, new_figure, to_png
from llava_scale.viz.dataset import ModelSide
from llava_scale.viz.page import number, page, percent, picture, section, text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from llava_scale.data.dataset import ShardedDataset
    from llava_scale.types import MediaInfo, Turn

_SHOWN_BAD = 20
_SHOWN_MIXES = 12
_BINS = 40
_MANY_TIMES = 20  # longest over median from which a length axis is logarithmic


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingOptions:
    """How rows are filled, as in ``data.packing``."""

    row_length: int
    lookahead_rows: int
    truncate: bool = False


@dataclass(slots=True, kw_only=True)
class DatasetStats:
    """Figures of the samples that were looked at; one entry a sample (a picture, a row) in each list.

    Attributes:
        name: Of the data set.
        path: Folder or URL.
        num_samples: Samples in the data set.
        num_looked_at: Samples behind these figures.
        model_name: Model that tokens were counted for, "" for none.
        text_chars: Characters of all turns.
        answers: Turns of the assistant.
        mixes: Kinds and numbers of media -> samples.
        picture_sizes: Width and height of every picture.
        tokens: Positions in the model's input, media included.
        media_tokens: Positions of media.
        supervised: Positions that the loss counts.
        row_length: Tokens that a row holds; 0 where rows were not simulated.
        row_fill: Share of each row that is filled.
        num_too_long: Samples longer than a row.
        bad: Key and reason of samples that cannot be used.
    """

    name: str
    path: str
    num_samples: int
    num_looked_at: int = 0
    model_name: str = ""
    text_chars: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    mixes: Counter[str] = field(default_factory=Counter)
    picture_sizes: list[tuple[int, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    media_tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    row_length: int = 0
    row_fill: list[float] = field(default_factory=list)
    num_too_long: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)

    def quantities(self) -> dict[str, list[int]]:
        """The lengths that were measured, by their names for people."""
        named = {
            "text, characters": self.text_chars,
            "answers a sample": self.answers,
            "picture width": [width for width, _ in self.picture_sizes],
            "picture height": [height for _, height in self.picture_sizes],
            "tokens": self.tokens,
            "media tokens": self.media_tokens if any(self.media_tokens) else [],
            "supervised tokens": self.supervised,
        }
        return {name: values for name, values in named.items() if values}


def collect_stats(
    dataset: ShardedDataset,
    model: ModelSide,
    *,
    limit: int = 0,
    packing: PackingOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DatasetStats:
    """Look at samples spread evenly over a data set; media are not read, only their sizes from the index.

    Args:
        dataset: Samples.
        model: Tokens are counted where it has an encoder.
        limit: Most samples to look at; 0 takes all.
        packing: Simulate rows, in random order, where tokens of text and media can be counted.
        on_progress: Called with samples done and in all.
    """
    size = len(dataset) if not limit else min(limit, len(dataset))
    numbers = np.unique(np.linspace(0, len(dataset) - 1, size).round().astype(np.int64)).tolist()
    stats = DatasetStats(name=dataset.name, path=dataset.path, num_samples=len(dataset), model_name=model.name)
    for done, sample_number in enumerate(numbers, start=1):
        try:
            _add(stats, dataset.turns(sample_number), dataset.media_infos(sample_number), model)
        except SampleError as error:
            stats.bad.append((dataset.key(sample_number), error.reason))
        if on_progress is not None:
            on_progress(done, len(numbers))
    stats.num_looked_at = len(numbers)
    if packing is not None and model.counter is not None and stats.tokens:
        _fill_rows(stats, packing)
    return stats


def write_stats_page(stats: DatasetStats, out: str | Path) -> Path:
    """Write ``stats.html`` and its diagrams as PNG into the folder ``out``; return the page.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    folder = Path(out)
    diagrams = {name: draw() for name, draw in _diagrams(stats).items()}
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for name, data in diagrams.items():
        (folder / f"{name}.png").write_bytes(data)
        image = picture(data, mime="image/png", alt=name.replace("_", " "))
        figures.append(f'<figure class="card">{image}</figure>')
    subtitle = f"{stats.num_looked_at:,} of {stats.num_samples:,} samples of {stats.path}"
    body = [
        _tiles(stats),
        section("Diagrams", f'<div class="grid">{"".join(figures)}</div>'),
        section("Lengths and sizes", _table(stats)),
        _bad(stats),
    ]
    target = folder / "stats.html"
    title = f"Statistics of {stats.name}"
    target.write_text(page(title=title, subtitle=subtitle, body=[part for part in body if part]), "utf-8")
    return target


def summary_rows(stats: DatasetStats) -> list[tuple[str, list[float]]]:
    """Per quantity its name and mean, 5th percentile, median, 95th percentile and maximum."""
    rows = []
    for name, values in stats.quantities().items():
        low, middle, high = np.percentile(values, [5, 50, 95]).tolist()
        rows.append((name, [float(np.mean(values)), low, middle, high, float(max(values))]))
    return rows


def _add(stats: DatasetStats, turns: Sequence[Turn], infos: tuple[MediaInfo, ...], model: ModelSide) -> None:
    if model.encoder is not None:
        encoded = model.encoder.encode(turns)
        counts = [model.counter.count(info, step=None).num_positions for info in infos] if model.counter else []
        # A placeholder is one id in the text and stands for all tokens of its medium.
        stats.tokens.append(len(encoded.input_ids) + sum(counts) - len(counts))
        stats.media_tokens.append(sum(counts))
        stats.supervised.append(sum(encoded.supervised))
    stats.text_chars.append(sum(len(turn.text) for turn in turns))
    stats.answers.append(sum(turn.role == "assistant" for turn in turns))
    stats.mixes[_mix(infos)] += 1
    stats.picture_sizes += [(info.width, info.height) for info in infos if info.kind == "image" and info.width]


def _mix(infos: Sequence[MediaInfo]) -> str:
    counts = Counter(info.kind for info in infos)
    named = [f"{counts[kind]} {kind}s" if counts[kind] > 1 else kind for kind in MEDIA_KINDS if counts[kind]]
    return " + ".join(named) or "text only"


def _fill_rows(stats: DatasetStats, packing: PackingOptions) -> None:
    """Fill rows as the loader does, from samples in random order."""
    pool = TokenPool(packing.row_length, packing.lookahead_rows)
    stats.row_length = packing.row_length
    order = np.random.default_rng(0).permutation(len(stats.tokens)).tolist()
    for position in order:
        length = stats.tokens[position]
        stats.num_too_long += length > packing.row_length
        if length > packing.row_length and not packing.truncate:
            continue
        pool.add(cast("Any", position), min(length, packing.row_length))
        while pool.ready():
            _take_row(stats, pool)
    while pool.draws():
        _take_row(stats, pool)


def _take_row(stats: DatasetStats, pool: TokenPool) -> None:
    row = cast("list[int]", pool.take())
    filled = sum(min(stats.tokens[position], stats.row_length) for position in row)
    stats.row_fill.append(filled / stats.row_length)


def _tiles(stats: DatasetStats) -> str:
    num_pictures = len(stats.picture_sizes)
    tiles = [("samples", number(stats.num_samples), f"{stats.num_looked_at:,} looked at")]
    if num_pictures:
        tiles.append(("pictures", number(num_pictures), f"{num_pictures / max(1, len(stats.answers)):.2f} a sample"))
    if stats.tokens:
        total, media = sum(stats.tokens), sum(stats.media_tokens)
        about = f"{percent(media / total)} of media" if media else stats.model_name
        tiles.append(("tokens", number(total), about))
        tiles.append(("supervised", percent(sum(stats.supervised) / total), f"{number(sum(stats.supervised))} tokens"))
    if stats.row_fill:
        shown = f"{number(len(stats.row_fill))} of {stats.row_length:,} tokens"
        tiles.append(("row fill", percent(float(np.mean(stats.row_fill))), shown))
    if stats.num_too_long:
        tiles.append(("too long", number(stats.num_too_long), "longer than a row"))
    tiles.append(("unusable", number(len(stats.bad)), "see below" if stats.bad else "none found"))
    items = "".join(f"<div><dt>{text(n)}</dt><dd>{text(v)}<small>{text(a)}</small></dd></div>" for n, v, a in tiles)
    return f'<div class="card"><dl class="tiles">{items}</dl></div>'


def _table(stats: DatasetStats) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("", "mean", "5 %", "median", "95 %", "largest"))
    rows = "".join(
        f"<tr><td>{text(name)}</td>{''.join(f'<td>{number(round(value, 1), digits=4)}</td>' for value in values)}</tr>"
        for name, values in summary_rows(stats)
    )
    return f'<div class="card scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _bad(stats: DatasetStats) -> str:
    if not stats.bad:
        return ""
    rows = "".join(f"<tr><td><code>{text(k)}</code></td><td>{text(r)}</td></tr>" for k, r in stats.bad[:_SHOWN_BAD])
    note = f"the first {_SHOWN_BAD} of {len(stats.bad):,}" if len(stats.bad) > _SHOWN_BAD else ""
    table = f'<div class="card scroll"><table><tr><th>key</th><th>reason</th></tr>{rows}</table></div>'
    return section("Samples that cannot be used", table, note=note)


def _diagrams(stats: DatasetStats) -> dict[str, Callable[[], bytes]]:
    """File name of each diagram there are figures for, and what draws it."""
    diagrams: dict[str, Callable[[], bytes]] = {"modalities": lambda: _draw_mixes(stats.mixes)}
    if stats.text_chars:
        diagrams["text_chars"] = lambda: _draw_lengths("Text", "characters of all turns", stats.text_chars)
    if stats.tokens:
        unit = f"positions in the input of {stats.model_name}" if stats.model_name else "positions in the input"
        diagrams["tokens"] = lambda: _draw_lengths("Tokens", unit, stats.tokens, limit=stats.row_length)
        diagrams["supervised"] = lambda: _draw_lengths("Supervised", "tokens the loss counts", stats.supervised)
    if stats.answers:
        diagrams["turns"] = lambda: _draw_turns(stats.answers)
    if stats.picture_sizes:
        diagrams["picture_sizes"] = lambda: _draw_sizes(stats.picture_sizes)
    if stats.row_fill:
        diagrams["row_fill"] = lambda: _draw_fill(stats)
    return diagrams


def _draw_lengths(title: str, unit: str, values: Sequence[int], *, limit: int = 0) -> bytes:
    figure, axes = _axes(title, unit)
    largest, middle = max(values), float(np.median(values))
    edges: NDArray[np.float64] = np.linspace(0, largest + 1, min(_BINS, largest + 1) + 1)
    if largest > _MANY_TIMES * max(1.0, middle):
        edges = np.geomspace(1, largest + 1, _BINS + 1)
        axes.set_xscale("log")
    axes.hist(np.maximum(values, 1e-9 + edges[0]), bins=edges.tolist(), color=COLOURS[0])
    axes.axvline(middle, color="#1b1f24", linewidth=1)
    axes.annotate(
        f"median {number(round(middle))}", (middle, 1), xycoords=("data", "axes fraction"), xytext=(4, -9),
        textcoords="offset points", fontsize=8, color="#1b1f24",
    )  # fmt: skip
    if limit and limit < 2 * largest:
        axes.axvline(limit, color=COLOURS[4], linewidth=1, linestyle="--")
        axes.annotate(
            f"row of {limit:,}", (limit, 1), xycoords=("data", "axes fraction"), xytext=(-4, -9),
            textcoords="offset points", fontsize=8, color=COLOURS[4], ha="right",
        )  # fmt: skip
    axes.set_ylabel("samples", fontsize=8.5, color="#5b6472")
    return to_png(figure)


def _draw_turns(answers: Sequence[int]) -> bytes:
    figure, axes = _axes("Turns", "answers in a sample")
    counts = Counter(answers)
    axes.bar(list(counts), list(counts.values()), color=COLOURS[0], width=0.8)
    if len(counts) <= _BINS // 2:
        axes.set_xticks(sorted(counts))
    axes.set_ylabel("samples", fontsize=8.5, color="#5b6472")
    return to_png(figure)


def _draw_mixes(mixes: Counter[str]) -> bytes:
    figure, axes = _axes("Modalities", "samples with these media")
    ranked = mixes.most_common()
    shown = ranked[:_SHOWN_MIXES]
    if len(ranked) > len(shown):
        shown.append(("others", sum(count for _, count in ranked[_SHOWN_MIXES:])))
    shown = shown[::-1] or [("none", 0)]
    bars = axes.barh([name for name, _ in shown], [count for _, count in shown], color=COLOURS[0], height=0.62)
    axes.bar_label(bars, labels=[f"{count:,}" for _, count in shown], padding=4, fontsize=8.5, color="#3d4550")
    axes.margins(x=0.14)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    return to_png(figure)


def _draw_sizes(sizes: Sequence[tuple[int, int]]) -> bytes:
    figure, axes = _axes("Pictures", "width and height in pixels; larger dots hold more")
    counts = Counter(sizes)
    widths, heights = zip(*counts, strict=True)
    area = 12 + 240 * np.array(list(counts.values())) / max(counts.values())
    axes.scatter(widths, heights, s=area, color=COLOURS[0], alpha=0.45, linewidths=0)
    side = max(*widths, *heights) * 1.08
    axes.plot([0, side], [0, side], color="#b8bec7", linewidth=0.8, zorder=0)
    axes.set_xlim(0, side)
    axes.set_ylim(0, side)
    axes.set_xlabel("width", fontsize=8.5, color="#5b6472")
    axes.set_ylabel("height", fontsize=8.5, color="#5b6472")
    return to_png(figure)


def _draw_fill(stats: DatasetStats) -> bytes:
    mean = percent(float(np.mean(stats.row_fill)))
    figure, axes = _axes("Row fill", f"share of a row of {stats.row_length:,} tokens; mean {mean}")
    lowest = min(0.9, *stats.row_fill)
    axes.hist(stats.row_fill, bins=np.linspace(lowest, 1.0, 31).tolist(), color=COLOURS[2])
    axes.set_ylabel("rows", fontsize=8.5, color="#5b6472")
    axes.xaxis.set_major_formatter(lambda value, _: percent(value))
    return to_png(figure)


def _axes(title: str, unit: str) -> tuple[Any, Any]:
    figure = new_figure(5.6, 3.3)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#1b1f24", pad=20)
    axes.text(0, 1.035, unit, transform=axes.transAxes, fontsize=8.5, color="#5b6472")
    axes.tick_params(labelsize=8.5, colors="#3d4550", length=0)
    axes.grid(axis="y", color="#e6e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b8bec7")
    return figure, axes
