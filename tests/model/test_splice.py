from __future__ import annotations

import pytest
import torch

from llava_scale.errors import ShapeError
from llava_scale.model.splice import splice


def test_media_tokens_land_in_order_and_text_stays():
    ids = torch.tensor([[1, 9, 9, 2], [9, 3, 4, 5]])
    embeds = torch.arange(2 * 4 * 2, dtype=torch.float32).view(2, 4, 2)
    media = -torch.arange(1.0, 7.0).view(3, 2)
    spliced = splice(embeds, ids, 9, media, kind="image")
    assert torch.equal(spliced[ids == 9], media)
    assert torch.equal(spliced[ids != 9], embeds[ids != 9])


def test_gradients_reach_media_and_text_in_their_places_only():
    ids = torch.tensor([[1, 9, 2]])
    embeds = torch.zeros(1, 3, 2, requires_grad=True)
    media = torch.zeros(1, 2, requires_grad=True)
    splice(embeds, ids, 9, media, kind="image").sum().backward()
    assert embeds.grad[0, :, 0].tolist() == [1, 0, 1]
    assert media.grad.tolist() == [[1, 1]]


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_count_that_does_not_fit_is_refused_with_both_counts(num_tokens):
    ids = torch.tensor([[9, 9, 1]])
    with pytest.raises(ShapeError, match=f"2 <image> positions, but its images make {num_tokens} tokens"):
        splice(torch.zeros(1, 3, 4), ids, 9, torch.zeros(num_tokens, 4), kind="image")
