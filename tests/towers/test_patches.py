"""Patch embeddings as matrix products."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llava_scale.towers.patches import PatchConv2d, use_patch_products


@pytest.mark.parametrize(
    ("kernel", "bias", "size"), [(4, True, (16, 24)), (7, False, (30, 20)), ((3, 5), True, (9, 10))]
)
def test_results_and_gradients_are_those_of_the_convolution(kernel, bias, size):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, kernel, stride=kernel, bias=bias)
    ours = copy.deepcopy(conv)
    use_patch_products(ours)
    assert type(ours) is PatchConv2d
    pixels = torch.randn(2, 3, *size, requires_grad=True)
    expected, found = conv(pixels), ours(pixels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [pixels, *conv.parameters()], upstream)
    got = torch.autograd.grad(found, [pixels, *ours.parameters()], upstream)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 8, 4, stride=2),
        nn.Conv2d(3, 8, 4, stride=4, padding=1),
        nn.Conv2d(4, 8, 4, stride=4, groups=2),
        nn.Conv2d(3, 8, 2, stride=2, dilation=2),
        nn.Conv2d(3, 8, 1),
    ],
    ids=["overlap", "padding", "groups", "dilation", "single pixels"],
)
def test_other_convolutions_stay_as_they_are(conv):
    model = nn.Sequential(conv)
    use_patch_products(model)
    assert type(model[0]) is nn.Conv2d


def test_names_of_parameters_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GELU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_patch_products(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.state_dict().keys() == before.keys()
