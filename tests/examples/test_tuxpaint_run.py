from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import run
import torch
from caption_page import write_caption_page
from caption_scoring import CaptionScores, ranking_summary, score_all
from PIL import Image

from llava_scale.config import ModelConfig
from llava_scale.data.dataset import open_dataset
from llava_scale.data.write import pack
from llava_scale.eval.runner import EvalSettings, evaluate
from llava_scale.model import build_model


def scores_of(values: list[list[float]], lengths: list[int] | None = None) -> CaptionScores:
    num = len(values)
    return CaptionScores(
        keys=tuple(f"k{number}" for number in range(num)),
        captions=tuple(f"Caption {number}." for number in range(num)),
        lengths=torch.tensor(lengths or [1] * num, dtype=torch.float64),
        log_likelihood=torch.tensor(values, dtype=torch.float64),
    )


def test_losses_are_per_token_of_own_and_of_all_other_pictures() -> None:
    scores = scores_of([[-2.0, -9.0], [-6.0, -4.0]], [1, 2])
    assert scores.loss == pytest.approx((2 + 4) / 3)
    assert scores.loss_with_wrong_picture == pytest.approx((6 + 9) / 3)


def test_ranks_are_by_likelihood_per_token() -> None:
    scores = scores_of([[-2.0, -3.0], [-2.0, -3.0]], [1, 2])
    assert scores.ranks == [2, 1]


def test_a_caption_that_is_likely_for_every_picture_has_no_advantage_in_corrected_ranks() -> None:
    scores = scores_of([[-1.0, -5.0, -5.0], [-1.0, -2.0, -5.0], [-1.0, -5.0, -2.0]])
    assert scores.ranks == [1, 2, 2]
    assert scores.corrected_ranks == [1, 1, 1]
    assert scores.best(1, 2) == ["Caption 2."]


def test_the_summary_has_shares_chance_levels_and_intervals() -> None:
    values = torch.full((10, 10), -5.0).fill_diagonal_(-1.0)
    values[0, 0] = -9.0
    summary = ranking_summary(scores_of(values.tolist()))
    assert (summary["chance_top1"], summary["chance_top5"], summary["ranking_candidates"]) == (0.1, 0.5, 10)
    assert summary["ranking_top1"] == 0.9
    assert summary["ranking_top1_low"] < 0.9 < summary["ranking_top1_high"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    generator = np.random.default_rng(0)
    records = []
    for number, caption in enumerate(["A red ball.", "A blue box.", "Two green trees by a lake.", "A cat."]):
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
        turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": caption}]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns, "task": "caption"})
    (folder / "all.json").write_text(json.dumps(records))
    pack(folder / "all.json", folder / "shards", media_root=folder)
    return folder / "shards"


def test_scores_of_all_pairs_agree_with_the_evaluation_of_the_package(shards: Path) -> None:
    model, processor = build_model(ModelConfig(preset="tiny"), chat_template="plain", seed=1)
    scores = score_all(model.eval(), processor, str(shards))
    result = evaluate(
        model,
        processor,
        open_dataset(str(shards)),
        lambda questions: [""] * len(questions),
        settings=EvalSettings(ranking=4, blind_model=False, num_examples=0),
    )
    assert scores.captions == ("A red ball.", "A blue box.", "Two green trees by a lake.", "A cat.")
    assert scores.loss == pytest.approx(result.loss, abs=1e-4)
    assert int(scores.lengths.sum()) == result.num_supervised
    assert result.ranking is not None
    assert ranking_summary(scores)["ranking_top1"] == result.ranking.top1.value


def test_the_page_shows_every_picture_with_what_the_model_said(tmp_path: Path) -> None:
    scores = scores_of([[-1.0, -5.0], [-5.0, -1.0]])
    picture = tmp_path / "p.jpg"
    Image.new("RGB", (8, 8), "red").save(picture)
    summary = run.summary_of(scores, ["A <cat>.", "A dog."], {"train": 2.0})
    write_caption_page(
        tmp_path / "page.html",
        summary=summary,
        scores=scores,
        pictures=[picture.read_bytes()] * 2,
        answers=["A <cat>.", "A dog."],
    )
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert "A &lt;cat&gt;." in page
    assert "rank 1" in page


def test_the_summary_is_plain_json_with_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    scores = scores_of([[-1.0, -5.0], [-5.0, -1.0]])
    summary = json.loads(json.dumps(run.summary_of(scores, ["a", "b"], {"train": 2.0, "data": 1.5})))
    assert {"loss", "ranking_top1", "ranking_top5", "chance_top1"} <= summary.keys()
    assert summary["seconds"] == {"train": 2.0, "data": 1.5, "total": 3.5}
    run.print_captions(scores, ["a", "b"])
    run.print_figures(summary)
    assert "100.0%" in capsys.readouterr().out


def test_time_of_a_stage_adds_up_over_invocations_even_when_one_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with run.Clock(tmp_path / "seconds.json").stage("train", "Train"):
            raise KeyError

    (tmp_path / "seconds.json").write_text(json.dumps({"train": 100.0, "data": 3.0}))
    with pytest.raises(KeyError):
        fail()
    seconds = run.Clock(tmp_path / "seconds.json").seconds
    assert seconds["train"] >= 100.0
    assert seconds["data"] == 3.0


def test_the_recipe_gets_the_folders_of_the_run_and_overrides_win(tmp_path: Path) -> None:
    places = run.Places(tmp_path / "a run")
    config = run.settings_of(places, ["train.steps=3", "train.precision=bf16"])
    assert config.train.steps == 3
    assert config.train.precision == "bf16"
    assert config.data.sources[0].path == str(places.shards("train"))
    assert config.model.vision_tower_kwargs["weights"] == str(places.tower_weights)
    assert run.settings_of(places, []).train.precision == run.faster_precision()


def test_a_run_that_goes_on_keeps_its_precision(tmp_path: Path) -> None:
    places = run.Places(tmp_path)
    for precision in ("fp32", "bf16"):
        places.train.mkdir(parents=True, exist_ok=True)
        (places.train / "config.yaml").write_text(
            f"model: {{preset: tiny}}\ntrain: {{precision: {precision}}}\n", encoding="utf-8"
        )
        assert run.settings_of(places, []).train.precision == precision
