from __future__ import annotations

import io

import pytest
from PIL import Image

from llava_scale.errors import MissingExtraError
from llava_scale.viz.curves import draw_overview, draw_panel, panels_of, smoothed
from llava_scale.viz.runs import read_run


def test_diagrams_are_those_with_points_and_scores_follow_the_held_out_loss(run_folder):
    keys = [panel.key for panel in panels_of([read_run(run_folder)])]
    assert keys[:4] == ["loss", "eval/loss", "eval/exact_match", "lr"]
    assert "samples_per_s" in keys
    assert panels_of([]) == []


def test_smoothing_keeps_steps_and_has_no_start_bias():
    line = smoothed([(i, 5.0) for i in range(100)])
    assert [step for step, _ in line] == list(range(100))
    assert all(value == pytest.approx(5.0) for _, value in line)


def test_smoothing_damps_noise():
    noisy = [(i, 1.0 + (-1.0) ** i) for i in range(300)]
    assert all(abs(value - 1.0) < 0.2 for _, value in smoothed(noisy)[50:])


def test_a_diagram_is_a_png_1120_pixels_wide(run_folder):
    run = read_run(run_folder)
    panel = panels_of([run])[0]
    drawn = Image.open(io.BytesIO(draw_panel(panel, [run])))
    assert (drawn.format, drawn.width) == ("PNG", 1120)


def test_runs_of_very_unequal_length_share_a_diagram(tmp_path, make_run):
    runs = [read_run(make_run(tmp_path / str(n), name=str(n), steps=n)) for n in (1, 60)]
    assert draw_overview(panels_of(runs), runs).startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(run_folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run = read_run(run_folder)
    with pytest.raises(MissingExtraError, match=r"llava-scale\[plot\]"):
        draw_panel(panels_of([run])[0], [run])
