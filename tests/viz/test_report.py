from __future__ import annotations

import re

import pytest

from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.viz.page import duration, number, percent
from llava_scale.viz.report import write_report
from llava_scale.viz.runs import read_run
from llava_scale.viz.scores import write_evaluation_page


def test_the_report_of_one_run_is_one_file_with_curves_scores_and_answers(run_folder, tmp_path):
    target = write_report([run_folder], tmp_path / "out")
    content = target.read_text()
    assert target == tmp_path / "out" / "report.html"
    assert (tmp_path / "out" / "curve-eval-loss.png").is_file()
    assert (tmp_path / "out" / "curves.png").is_file()
    assert "What colour is the &lt;large&gt; shape?" in content
    assert content.count("data:image/jpeg;base64,") == 6
    assert "blind 29.2\xa0%" in content
    assert "of 240" in content


def test_nothing_is_loaded_from_elsewhere(run_folder, tmp_path):
    content = write_report([run_folder], tmp_path / "out").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', content)
    assert "<script" not in content


def test_several_runs_stand_side_by_side_with_tokens_before_and_after(run_folder, tmp_path, make_run):
    other = make_run(tmp_path / "b", name="halved", speed=160.0, removed=0.5)
    content = write_report([run_folder, other], tmp_path / "out").read_text()
    assert "Side by side" in content
    assert re.search(r"<td>1\.(59|60|61)×</td>", content)
    assert "<td>64 to 32</td><td>50\xa0%</td>" in content
    assert "<td>64</td><td>0\xa0%</td>" in content
    for name in ("runs", "curve-visual_per_sample", "curve-removed", "curve-seconds", "curve-loss"):
        assert (tmp_path / "out" / f"{name}.png").is_file()
    alone = write_report([run_folder], tmp_path / "alone").read_text()
    assert "Side by side" not in alone
    assert not (tmp_path / "alone" / "curve-removed.png").exists()  # all tokens stay


def test_several_runs_are_compared_by_their_differing_settings(run_folder, tmp_path, make_run):
    other = make_run(tmp_path / "b", name="faster", lr=2e-3)
    content = write_report([run_folder, other], tmp_path / "out", title="Two rates").read_text()
    assert "<h1>Two rates</h1>" in content
    assert "train.learning_rate</code></td><td><code>0.001</code></td><td><code>0.002" in content
    assert "<code>seed</code></td>" not in content


def test_scores_of_a_summary_are_shown_where_there_is_no_evaluation(tmp_path, make_run):
    folder = make_run(tmp_path / "a", name="a", steps=3)
    (folder / "summary.json").write_text(
        '{"exact_match": {"image": 0.912}, "blind": {"image": 0.25}, "loss": 0.5, "ranking_top1": 0.4, '
        '"chance_top1": 0.01}'
    )
    content = write_report([folder], tmp_path / "out").read_text()
    assert "91.2\xa0%" in content
    assert "chance 1\xa0%" in content


def test_a_run_without_log_lines_says_so(tmp_path, make_run):
    folder = make_run(tmp_path / "a", name="a", steps=0)
    assert "The log has no lines yet." in write_report([folder], tmp_path / "out").read_text()


def test_a_missing_picture_is_said_and_not_fatal(run_folder, tmp_path):
    (run_folder / "eval" / "pictures" / "0.jpg").unlink()
    assert "(0.jpg is missing)" in write_report([run_folder], tmp_path / "out").read_text()


def test_an_evaluation_kept_elsewhere_can_be_named(tmp_path, make_evaluation, make_run):
    folder = make_run(tmp_path / "a", name="a", steps=3)
    record = read_run(folder, evaluation=make_evaluation(tmp_path / "elsewhere"))
    assert "data:image/jpeg" in write_report([record], tmp_path / "out").read_text()


def test_no_runs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([], tmp_path)


def test_an_unwritable_place_is_named(run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the report into"):
        write_report([run_folder], tmp_path / "file")


def test_the_evaluation_page_stands_beside_its_json(tmp_path, make_evaluation):
    folder = make_evaluation(tmp_path / "e").parent
    content = write_evaluation_page(folder).read_text()
    assert content.count('<span class="mark bad">wrong</span>') == 3
    assert "60 wrong and 180 right ones" in content


def test_an_evaluation_page_needs_its_json(tmp_path):
    with pytest.raises(CheckpointError, match="make it with llava-scale eval"):
        write_evaluation_page(tmp_path)


def test_numbers_are_written_for_reading():
    assert [number(x) for x in (None, 3, 1234567, 0.123456, 1234.5, float("inf"))] == [
        "–", "3", "1,234,567", "0.123", "1,234", "inf",
    ]  # fmt: skip
    assert [percent(x) for x in (0, 1, 0.5, 0.912)] == ["0\xa0%", "100\xa0%", "50\xa0%", "91.2\xa0%"]
    assert [duration(x) for x in (1.25, 59, 61, 7500)] == ["1.2 s", "59 s", "1 min 1 s", "2 h 5 min"]
