from __future__ import annotations

import json

import pytest

from llava_scale.errors import ConfigError, SampleError
from llava_scale.eval.metrics import Share
from llava_scale.eval.result import write_result
from llava_scale.eval.runner import EvalSettings, choose_examples, evaluate, spread

PLAIN_SIZE = 200  # bytes; a plain picture is smaller, a noisy one larger


def knows_colors(questions):
    """Right about everything it can see, "red" for what it cannot."""
    answers = []
    for question in questions:
        pictures = question.media.get("image", ())
        sees = bool(pictures) and all(len(data) > PLAIN_SIZE for data in pictures)
        answers.append(f" {question.gold.upper()}." if sees or not pictures else "red")
    return answers


@pytest.fixture(scope="module")
def result(tiny, dataset):
    return evaluate(*tiny, dataset, knows_colors, checkpoint="c", settings=EvalSettings(num_examples=10, ranking=4))


def test_exact_match_is_counted_per_modality_and_task(result):
    assert result.num_samples == 32
    assert result.num_questions == 16 * 2 + 4 * 2 + 4 + 8
    assert result.exact_match["overall"] == Share(52, 52)
    assert list(result.exact_match) == ["overall", "text", "image"]
    assert result.exact_match["image"] == Share(48, 48)
    assert result.by_task == {
        "caption": Share(8, 8), "color": Share(32, 32), "compare": Share(8, 8), "text": Share(4, 4),
    }  # fmt: skip


def test_blind_is_the_most_frequent_answer_to_the_same_question(result):
    # no question is asked 20 times here: one guess, "yes", for all
    assert result.blind_by_task["color"] == Share(12, 32)
    assert result.blind_by_task["compare"] == Share(0, 8)
    assert "text" not in result.blind


def test_the_blind_model_sees_plain_pictures(result):
    assert result.blind_model_by_task["color"] == Share(4, 32)
    assert result.blind_model["image"] == Share(4, 48)


def test_loss_and_ranking_are_there(result):
    assert 0 < result.loss < 20
    assert result.num_supervised > 52
    assert result.ranking.num_samples == 8
    assert result.ranking.num_candidates == 4
    assert set(result.seconds) == {"loss", "answers", "blind answers", "ranking"}


def test_the_result_is_written_with_its_pictures(result, tmp_path):
    target = write_result(result, tmp_path / "out")
    content = json.loads(target.read_text())
    assert content["exact_match"]["image"]["value"] == 1.0
    assert content["ranking"]["chance_top1"] == 0.25
    assert len(content["examples"]) == 10
    shown = next(example for example in content["examples"] if example["pictures"])
    assert (target.parent / shown["pictures"][0]).read_bytes().startswith(b"\xff\xd8")
    summary = result.summary()
    assert summary["blind"]["image"] == result.blind["image"].value
    assert summary["chance_top1"] == 0.25


def test_writing_again_leaves_nothing_of_the_old_result(result, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "old.jpg").write_bytes(b"")
    write_result(result, tmp_path)
    assert not (tmp_path / "pictures" / "old.jpg").exists()


def test_unusable_samples_are_listed_and_left_out(tiny, dataset_with_broken):
    progress = []
    result = evaluate(
        *tiny, dataset_with_broken, knows_colors, on_progress=lambda *arguments: progress.append(arguments)
    )
    assert result.num_samples == 30
    assert [item.key for item in result.skipped] == ["0000", "0030"]
    assert all(item.shard == "shard-00000.tar" and item.reason for item in result.skipped)
    assert progress[-1] == ("samples", 32, 32)


def test_a_question_the_model_cannot_take_is_left_out_and_listed(tiny, dataset):
    def refuses_captions(questions):
        return [SampleError("too long") if q.task == "caption" else q.gold for q in questions]

    result = evaluate(*tiny, dataset, refuses_captions, settings=EvalSettings(blind_model=False))
    assert result.exact_match["overall"] == Share(44, 44)
    assert [item.reason for item in result.skipped] == ["too long"] * 8
    assert result.blind_model == {}


def test_training_mode_is_put_back(tiny, dataset):
    model, processor = tiny
    model.train()
    evaluate(model, processor, dataset, knows_colors, settings=EvalSettings(limit=2, blind_model=False))
    assert model.training
    model.eval()


def test_a_limit_takes_samples_from_everywhere(tiny, dataset):
    result = evaluate(*tiny, dataset, knows_colors, settings=EvalSettings(limit=8, blind_model=False))
    assert result.num_samples == 8
    assert set(result.by_task) == {"caption", "color", "compare", "text"}
    assert spread(10, 3) == [0, 3, 6]
    assert spread(3, 0) == spread(3, 9) == [0, 1, 2]


def test_examples_favour_wrong_answers_and_fill_up_with_the_others():
    correct = [place % 10 != 0 for place in range(100)]
    assert sum(not correct[place] for place in choose_examples(correct, 8)) == 4
    assert sum(not correct[place] for place in choose_examples(correct, 40)) == 10
    assert len(choose_examples([True] * 5, 8)) == 5
    assert len(choose_examples([False] * 9, 8)) == 8
    assert choose_examples([], 8) == []


def test_ranking_without_captions_names_the_tasks_there_are(tiny, dataset):
    settings = EvalSettings(ranking=4, ranking_task="captions", blind_model=False)
    with pytest.raises(ConfigError, match="tasks here: caption, color, compare, text"):
        evaluate(*tiny, dataset, knows_colors, settings=settings)


@pytest.mark.parametrize("options", [{"limit": -1}, {"ranking": 1}, {"num_examples": -2}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        EvalSettings(**options)
