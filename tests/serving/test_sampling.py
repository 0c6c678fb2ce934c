from __future__ import annotations

import torch

from llava_scale.serving.sampling import Sampling, TokenSampler, keep_top_p


def test_draws_follow_the_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampling = Sampling(temperature=2.0, seed=0)
    sampler = TokenSampler(sampling, sampling.generators([0]))
    drawn = torch.tensor([int(sampler(torch.empty(0), scores).argmax()) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(shares, (scores[0] / 2).softmax(0), atol=0.025)


def test_top_p_keeps_the_smallest_set_that_reaches_the_share():
    scores = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    assert keep_top_p(scores, 0.7).isfinite().tolist() == [[False, True, False, True]]
    assert keep_top_p(scores, 0.01).isfinite().tolist() == [[False, True, False, False]]
    assert torch.equal(keep_top_p(scores, 1.0), scores)


def test_tokens_that_are_ruled_out_are_never_drawn():
    sampling = Sampling(temperature=5.0, seed=1)
    sampler = TokenSampler(sampling, sampling.generators([0]))
    scores = torch.tensor([[0.0, float("-inf"), 0.0]])
    assert all(int(sampler(torch.empty(0), scores).argmax()) != 1 for _ in range(200))


def test_each_request_has_draws_of_its_own():
    first, second = Sampling(temperature=1.0, seed=4).generators([0, 1])
    again = Sampling(temperature=1.0, seed=4).generators([1])[0]
    assert first.initial_seed() != second.initial_seed() == again.initial_seed()
