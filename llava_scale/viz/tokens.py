"""Figures of merge maps, query windows, and attention over pictures and time (extra ``[plot]``).

Legend: ``T`` frames, ``S`` side in pixels.
"""

from __future__ import annotations

import colorsys
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_scale.viz.curves import new_figure, to_png

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from llava_scale.types import Grid
    from llava_scale.viz.token_maps import AttentionMap, MergeMap

    Pixels = NDArray[np.uint8]

CELL = 28
"""Least pixels of a token's side in a figure."""

TINT = 0.5
"""Share of a group's colour over the picture."""

INK, SOFT, UNSEEN, BAR = "#1b1f24", "#5b6472", "#c31d4b", "#2563eb"
_GOLDEN = 0.618033988749895  # turns of the colour circle between groups: neighbours in number lie far apart


def draw_merges(frames: Pixels, maps: Sequence[MergeMap]) -> bytes:
    """PNG: the picture or the frames, and below or beside them each merge map.

    Patches of one group share a colour, and its output's place is dotted; patches that stayed alone show the picture;
    dropped ones are dark. For clips a bar beside each row tells how many tokens each frame kept.

    Args:
        frames: ``(T, S, S, 3)`` RGB.
        maps: Of the same frames.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return _merges_of_clip(frames, maps) if len(frames) > 1 else _merges_of_picture(frames[0], maps)


def _merges_of_picture(picture: Pixels, maps: Sequence[MergeMap]) -> bytes:
    figure = new_figure(3.1 * (1 + len(maps)), 3.5)
    panels = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
    _show(panels[0], _enlarged(picture, maps[0].grid), "as the model gets it")
    for axes, merge_map in zip(panels[1:], maps, strict=True):
        shown = _painted(picture, merge_map, frame=0)
        _show(axes, shown, merge_map.title)
        _dot_anchors(axes, merge_map, frame=0, side=len(shown))
    return to_png(figure)


def _merges_of_clip(frames: Pixels, maps: Sequence[MergeMap]) -> bytes:
    num_frames = len(frames)
    figure = new_figure(1.75 * num_frames + 2.6, 2.15 * (1 + len(maps)))
    columns = [*[1.0] * num_frames, 1.45]
    panels = figure.subplots(1 + len(maps), num_frames + 1, squeeze=False, width_ratios=columns)
    for frame in range(num_frames):
        _show(panels[0][frame], _enlarged(frames[frame], maps[0].grid), f"frame {frame + 1}")
    panels[0][num_frames].axis("off")
    for row, merge_map in zip(panels[1:], maps, strict=True):
        for frame in range(num_frames):
            shown = _painted(frames[frame], merge_map, frame)
            _show(row[frame], shown, merge_map.title if frame == 0 else "")
            _dot_anchors(row[frame], merge_map, frame, side=len(shown))
        _kept_bars(row[num_frames], merge_map)
    return to_png(figure)


def _kept_bars(axes: Any, merge_map: MergeMap) -> None:
    kept, full = merge_map.kept_per_frame, merge_map.grid[1] * merge_map.grid[2]
    places = np.arange(1, len(kept) + 1)
    axes.barh(places, np.full(len(kept), full), color="#eceef2", height=0.72)
    axes.barh(places, kept, color=BAR, height=0.72)
    for place, count in zip(places, kept.tolist(), strict=True):
        axes.text(full * 1.03, place, f"{count}", va="center", fontsize=7, color=INK)
    axes.set_xlim(0, full * 1.25)
    axes.invert_yaxis()
    axes.set_yticks(places)
    _plain(axes, title=f"kept of {full} a frame", ylabel="frame")
    axes.set_xticks([])


def draw_windows(windows: Sequence[range], grid: Grid) -> bytes:
    """PNG: the part of the token line that each query sees, and how many queries see each token.

    Tokens that none sees are marked; dotted lines divide frames.

    Args:
        windows: One for each query.
        grid: Frames, rows and columns of what one set of queries looks at.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    num_tokens = grid[0] * grid[1] * grid[2]
    figure = new_figure(8.4, 5.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1.0])
    starts, lengths = [window.start for window in windows], [len(window) for window in windows]
    shades = [colorsys.hsv_to_rgb(0.58 + 0.3 * number / len(windows), 0.62, 0.86) for number in range(len(windows))]
    above.barh(range(len(windows)), lengths, left=starts, height=0.78, color=shades)
    above.set_ylim(len(windows) - 0.4, -0.6)
    widest = f"{min(lengths):,}" if min(lengths) == max(lengths) else f"{min(lengths):,} to {max(lengths):,}"
    title = f"{len(windows)} queries, each over {widest} of {num_tokens:,} tokens"
    _plain(above, title=title, ylabel="query")
    seen = np.zeros(num_tokens, dtype=np.int64)
    for window in windows:
        seen[window.start : window.stop] += 1
    below.fill_between(np.arange(num_tokens), seen, step="mid", color=BAR, alpha=0.35, linewidth=0)
    unseen = np.flatnonzero(seen == 0)
    if len(unseen):
        below.plot(unseen, np.zeros(len(unseen)), "|", color=UNSEEN, markersize=9, clip_on=False)
    below.set_ylim(0, max(1, seen.max()) * 1.15)
    note = (
        f"queries that see a token ({len(unseen):,} tokens seen by none)" if len(unseen) else "queries that see a token"
    )
    _plain(below, title=note, ylabel="queries", xlabel=f"token in raster order ({grid[0]} x {grid[1]} x {grid[2]})")
    for frame in range(1, grid[0]):
        for axes in (above, below):
            axes.axvline(frame * grid[1] * grid[2] - 0.5, color=SOFT, linewidth=0.7, linestyle=":")
    below.set_xlim(-0.5, num_tokens - 0.5)
    return to_png(figure)


def draw_attention(
    picture: Pixels, maps: Sequence[AttentionMap], queries: Sequence[int], heads: Sequence[int]
) -> bytes:
    """PNG: heat maps over the picture; a row for each query, for each question the mean of all heads and some heads.

    Patches outside of a query's window are dark. Colours of each map run from its own smallest weight to its largest,
    which its corner tells.

    Args:
        picture: ``(S, S, 3)`` RGB.
        maps: One for each question.
        queries: Numbers of the queries that are shown.
        heads: Numbers of the heads beside the mean.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    per_question = 1 + len(heads)
    figure = new_figure(1.72 * (1 + per_question * len(maps)), 1.78 * len(queries) + 0.5)
    panels = figure.subplots(len(queries), 1 + per_question * len(maps), squeeze=False)
    grid = (1, *maps[0].weights.shape[2:])
    for line, (row, query) in enumerate(zip(panels, queries, strict=True)):
        _show(row[0], _enlarged(picture, grid), "" if line else "as the model gets it")
        row[0].set_ylabel(f"query {query}", fontsize=8.5, color=INK)
        for number, seen in enumerate(maps):
            cells = [seen.weights[:, query].mean(axis=0), *(seen.weights[head, query] for head in heads)]
            names = [f"layer {seen.layer}, mean", *(f"head {head}" for head in heads)]
            for place, (weights, name) in enumerate(zip(cells, names, strict=True)):
                axes = row[1 + number * per_question + place]
                title = "" if line else _question_title(seen.question, name, first=place == 0)
                _show(axes, _heated(picture, weights), title)
                axes.text(0.03, 0.03, _range_text(weights), transform=axes.transAxes, fontsize=6, color="white")
    return to_png(figure)


def _question_title(question: str, name: str, *, first: bool) -> str:
    if not first:
        return name
    asked = textwrap.shorten(question, 48, placeholder="…") if question else "no question"
    return "\n".join([*textwrap.wrap(asked, 22), name])


def _painted(picture: Pixels, merge_map: MergeMap, frame: int) -> Pixels:
    """Frame ``frame`` with the groups in their colours and lines between them."""
    num_frames, rows, cols = merge_map.grid
    groups = merge_map.group.reshape(num_frames, rows, cols)[frame]
    sizes = np.bincount(merge_map.group[merge_map.group >= 0], minlength=len(merge_map.anchors))
    shown = _enlarged(picture, merge_map.grid).astype(np.float32)
    labels = np.kron(groups, np.ones((len(shown) // rows, shown.shape[1] // cols), dtype=np.int64))
    merged = (labels >= 0) & (sizes[labels.clip(min=0)] > 1)
    colours = _colours(len(merge_map.anchors))[labels.clip(min=0)]
    shown = np.where(merged[..., None], (1 - TINT) * shown + TINT * colours, shown)
    grey = shown.mean(axis=2, keepdims=True)
    shown = np.where((labels < 0)[..., None], 0.22 * grey + 18, shown)
    edges = np.zeros(labels.shape, dtype=bool)
    edges[1:] |= labels[1:] != labels[:-1]
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    shown[edges] = 0.35 * shown[edges] + 0.65 * 255 * merged[edges][..., None]
    return shown.clip(0, 255).astype(np.uint8)


def _heated(picture: Pixels, weights: NDArray[np.float32]) -> Pixels:
    """The picture in grey under the colours of the weights; black where they are zero."""
    from matplotlib import colormaps

    rows, cols = weights.shape
    shown = _enlarged(picture, (1, rows, cols)).astype(np.float32)
    low, high = _range_of(weights)
    patch = np.ones((len(shown) // rows, shown.shape[1] // cols))
    heat = colormaps["inferno"](np.kron((weights - low) / max(high - low, 1e-12), patch))[..., :3] * 255
    grey = shown.mean(axis=2, keepdims=True) * 0.85
    inside = np.kron(weights, patch)[..., None] > 0
    mixed: Pixels = np.where(inside, 0.3 * grey + 0.7 * heat, 0.12 * grey).clip(0, 255).astype(np.uint8)
    return mixed


def _range_of(weights: NDArray[np.float32]) -> tuple[float, float]:
    """Smallest weight in the window, and the largest."""
    inside = weights[weights > 0]
    return (float(inside.min()), float(inside.max())) if len(inside) else (0.0, 0.0)


def _range_text(weights: NDArray[np.float32]) -> str:
    low, high = _range_of(weights)
    return f"{low:.3f} to {high:.3f}"


def _enlarged(picture: Pixels, grid: Grid) -> Pixels:
    """The picture with whole, equal patches of at least ``CELL`` pixels."""
    from PIL import Image

    _, rows, cols = grid
    high = max(CELL, -(-picture.shape[0] // rows)) * rows
    wide = max(CELL, -(-picture.shape[1] // cols)) * cols
    blocky = high > 3 * picture.shape[0]
    resampling = Image.Resampling.NEAREST if blocky else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize((wide, high), resampling))


def _colours(number: int) -> NDArray[np.float32]:
    hues = [(place * _GOLDEN) % 1.0 for place in range(max(number, 1))]
    strengths = [(0.85, 0.95), (0.6, 1.0), (0.95, 0.72)]
    rgb = [colorsys.hsv_to_rgb(hue, *strengths[place % 3]) for place, hue in enumerate(hues)]
    return (np.array(rgb) * 255).astype(np.float32)


def _dot_anchors(axes: Any, merge_map: MergeMap, frame: int, side: int) -> None:
    """Mark the places of outputs with more than one member."""
    _, rows, cols = merge_map.grid
    sizes = np.bincount(merge_map.group[merge_map.group >= 0], minlength=len(merge_map.anchors))
    inside = (merge_map.anchors // (rows * cols) == frame) & (sizes > 1)
    place = merge_map.anchors[inside] % (rows * cols)
    cell = side / rows
    axes.scatter((place % cols + 0.5) * cell, (place // cols + 0.5) * cell, s=max(2.0, 90 / rows), c="white",
                 edgecolors=INK, linewidths=0.5)  # fmt: skip


def _show(axes: Any, pixels: Pixels, title: str) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        axes.set_title("\n".join(textwrap.wrap(title, 40)) if "\n" not in title else title, fontsize=8, color=INK,
                       loc="left")  # fmt: skip


def _plain(axes: Any, *, title: str, ylabel: str = "", xlabel: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=8, color=SOFT)
    axes.set_xlabel(xlabel, fontsize=8, color=SOFT)
    axes.tick_params(labelsize=7.5, colors=SOFT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
