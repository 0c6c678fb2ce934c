from __future__ import annotations

import torch

from llava_scale.serving.sampling import Sampling, choose_tokens, keep_top_p


def test_draws_follow_the_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    choosers = Sampling(temperature=2.0, seed=0).choosers([0])
    drawn = torch.tensor([choose_tokens(scores, choosers)[0] for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(shares, (scores[0] / 2).softmax(0), atol=0.025)


def test_top_p_keeps_the_smallest_set_that_reaches_each_rows_share():
    scores = torch.tensor([[0.1, 0.5, 0.15, 0.25]] * 3).log()
    kept = keep_top_p(scores, torch.tensor([[0.7], [0.01], [1.0]])).isfinite().tolist()
    assert kept == [[False, True, False, True], [False, True, False, False], [True] * 4]
    assert torch.equal(keep_top_p(scores, torch.ones(3, 1)), scores)


def test_tokens_that_are_ruled_out_are_never_drawn():
    choosers = Sampling(temperature=5.0, seed=1).choosers([0])
    scores = torch.tensor([[0.0, float("-inf"), 0.0]])
    assert {choose_tokens(scores, choosers)[0] for _ in range(200)} == {0, 2}


def test_greedy_and_drawn_answers_share_a_batch():
    scores = torch.tensor([[0.0, 5.0, 0.0]]).repeat(3, 1)
    choosers = [Sampling().choosers([0])[0], Sampling(temperature=9.0, seed=2).choosers([0])[0]]
    choosers.append(Sampling(temperature=9.0, top_p=0.1, seed=2).choosers([0])[0])
    drawn = [choose_tokens(scores, choosers) for _ in range(50)]
    assert {row[0] for row in drawn} == {1}
    assert {row[1] for row in drawn} == {0, 1, 2}
    assert {row[2] for row in drawn} == {1}


def test_each_request_has_draws_of_its_own():
    first, second = (chooser.generator for chooser in Sampling(temperature=1.0, seed=4).choosers([0, 1]))
    again = Sampling(temperature=1.0, seed=4).choosers([1])[0].generator
    assert first.initial_seed() != second.initial_seed() == again.initial_seed()
