from __future__ import annotations

import pytest
import torch

from llava_scale.eval.likelihood import HeldOutLoss, RowMaker, caption_scores, rank_captions, split_caption
from llava_scale.model import row_inputs


@pytest.fixture(scope="module")
def maker(tiny, dataset):
    return RowMaker(dataset, tiny[1], max_length=4096)


@pytest.fixture(scope="module")
def rows(maker, dataset):
    return [maker.row([number])[0] for number in range(len(dataset))]


def test_the_loss_is_that_of_the_samples_one_by_one(tiny, maker, rows):
    model = tiny[0]
    loss = HeldOutLoss(model)
    assert loss.value is None
    loss.add(maker.row(range(10))[0])
    loss.add(maker.row(range(10, 20))[0])
    total = num_tokens = 0.0
    for row in rows[:20]:
        total += float(model(**row_inputs(row), num_items_in_batch=1).loss)
        num_tokens += row.num_supervised
    assert loss.num_tokens == num_tokens
    assert loss.value == pytest.approx(total / num_tokens, rel=1e-5)


def test_caption_scores_are_those_of_whole_samples(tiny, rows):
    model = tiny[0]
    captioned = rows[24:]
    prompt, _ = split_caption(captioned[0])
    captions = sorted({split_caption(row)[1] for row in captioned}, key=lambda caption: (len(caption), caption))
    captions = [captions[0][:1], captions[1][:3], *captions]
    scores = caption_scores(model, captioned[0], captions)
    for caption, score in zip(captions, scores, strict=True):
        ids = torch.tensor([[*prompt, *caption]])
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=captioned[0].pixel_values).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(caption))
        assert score == pytest.approx(expected, rel=1e-4)


def test_captions_with_equal_beginnings_are_scored_as_by_themselves(tiny, rows, monkeypatch):
    """In one row that holds each beginning once; and one by one, as for layers that take no mask of any shape."""
    model = tiny[0]
    row = next(row for row in rows if row.pixel_values is not None)
    captions = [(30,), (30, 31), (30, 31, 40, 41), (30, 31, 40, 42), (33, 31, 40, 42), (30, 31, 40, 42, 30)]
    as_tree = caption_scores(model, row, captions)
    alone = [caption_scores(model, row, [caption])[0] for caption in captions]
    monkeypatch.setattr("llava_scale.eval.likelihood._attends_to_all", lambda model: False)
    repeated = caption_scores(model, row, captions)
    assert as_tree == pytest.approx(alone, rel=1e-5)
    assert as_tree == pytest.approx(repeated, rel=1e-5)


def test_groups_of_captions_change_no_score(tiny, rows, monkeypatch):
    captioned = rows[24:]
    captions = sorted((split_caption(row)[1] for row in captioned), key=lambda caption: (len(caption), caption))
    together = caption_scores(tiny[0], captioned[0], captions)
    monkeypatch.setattr("llava_scale.eval.likelihood._MOST_SCORES", 1)
    assert caption_scores(tiny[0], captioned[0], captions) == pytest.approx(together, rel=1e-5)


def test_ranking_counts_own_captions_that_are_likeliest(tiny, rows, monkeypatch):
    captioned = rows[24:]
    own = {split_caption(row)[1]: row for row in captioned}
    assert len(own) == 8

    def likes_own_of_first_six(model, row, captions):
        liked = any(row is other for other in captioned[:6])
        return [(-1.0 if own[caption] is row else -2.0) * (1 if liked else -1) for caption in captions]

    monkeypatch.setattr("llava_scale.eval.likelihood.caption_scores", likes_own_of_first_six)
    ranking = rank_captions(tiny[0], captioned, num_candidates=100)
    assert (ranking.num_samples, ranking.num_candidates) == (8, 8)
    assert ranking.sum_top1.correct == 6
    assert (ranking.chance(1), ranking.chance(5)) == (1 / 8, 5 / 8)
    assert rank_captions(tiny[0], captioned, num_candidates=3).chance(5) == 1.0


def test_equal_captions_are_one_candidate(tiny, rows):
    same = [rows[24], rows[24], rows[25]]
    assert rank_captions(tiny[0], same, num_candidates=10).num_candidates == 2
    with pytest.raises(ValueError, match="two different captions"):
        rank_captions(tiny[0], same[:2], num_candidates=10)
