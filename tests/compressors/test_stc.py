from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_scale.compressors import build_stc, token_count
from llava_scale.compressors.stc import STC, STCCount
from llava_scale.config.compressor import StcConfig
from llava_scale.errors import ShapeError
from tests.compressors import golden


def connector(window=(2, 2, 2), **sizes):
    torch.manual_seed(0)
    return STC(6, width=8, depth=1, window=window, **sizes).double()


def test_output_and_gradients_are_those_of_regnet_stages_around_a_convolution():
    """The stored stages are timm's, which VideoLLaMA 2 uses; weights go by their names."""
    arrays = golden.load("stc")
    module = STC(12, width=16, depth=2).double()
    module.load_state_dict({key[6:]: value for key, value in arrays.items() if key.startswith("param.")})
    x = arrays["x"].clone().requires_grad_()
    out = module(x, tuple(arrays["grid"].tolist()))
    golden.assert_same(out.tokens, arrays["out"])
    out.tokens.square().sum().backward()
    golden.assert_same(x.grad, arrays["grad_x_of_sum_sq"])
    golden.assert_same(module.sampler[0].weight.grad, arrays["grad_sampler_weight_of_sum_sq"])


@pytest.mark.parametrize(
    ("grid", "count"),
    [((1, 24, 24), 144), ((8, 24, 24), 576), ((16, 24, 24), 1152), ((7, 16, 16), 256), ((3, 5, 7), 24)],
)
def test_counts_are_those_of_the_paper_and_of_odd_sides(grid, count):
    config = StcConfig(type="stc")
    assert token_count(config, num_blocks=0).num_tokens(grid, None) == count
    assert STCCount((2, 2, 2)).num_tokens(grid, 7) == count


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    window=st.tuples(*[st.integers(1, 3)] * 3),
)
@settings(max_examples=40, deadline=None)
def test_tokens_positions_and_sizes_are_as_promised(grid, window):
    module = connector(window)
    num_tokens = grid[0] * grid[1] * grid[2]
    out = module(torch.randn(2, num_tokens, 6, dtype=torch.float64), grid)
    assert out.tokens.shape == (2, module.num_tokens(grid, 3), module.out_width(6))
    assert (out.positions.diff(dim=1) > 0).all()
    assert (out.sizes.sum(dim=1) == num_tokens).all()
    assert torch.isfinite(out.tokens).all()


def test_every_token_and_every_weight_has_a_part_in_the_result():
    module, grid = connector(), (3, 3, 5)
    x = torch.randn(1, 45, 6, dtype=torch.float64, requires_grad=True)
    out = module(x, grid).tokens
    (out * torch.randn_like(out)).sum().backward()
    assert (x.grad.abs().sum(dim=2) > 0).all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_gradients_are_right():
    module, grid = connector(), (2, 3, 2)
    x = torch.randn(1, 12, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, grid).tokens, x, fast_mode=True)


def test_media_do_not_mix_and_half_precision_stays_close():
    module, grid = connector(), (2, 4, 4)
    x = torch.randn(3, 32, 6, dtype=torch.float64)
    together = module(x, grid).tokens
    torch.testing.assert_close(module(x[1:2], grid).tokens, together[1:2])
    half = module.bfloat16()(x.bfloat16(), grid).tokens
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), together, atol=0.1, rtol=0.1)


def test_a_picture_is_a_clip_of_one_frame_repeated():
    module = connector()
    x = torch.randn(1, 16, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x, (1, 4, 4)).tokens, module(torch.cat([x, x], dim=1), (2, 4, 4)).tokens)


def test_the_width_is_the_language_models_unless_set():
    assert build_stc(StcConfig(type="stc", depth=1), in_width=6, text_width=12).out_width(6) == 12
    assert build_stc(StcConfig(type="stc", depth=1, width=8), in_width=6, text_width=12).out_width(6) == 8


def test_fresh_weights_depend_on_the_seed_alone():
    first, second = connector(), connector()
    torch.manual_seed(0)
    second.reset_parameters()
    torch.manual_seed(0)
    first.reset_parameters()
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_tokens_off_the_grid_are_refused():
    with pytest.raises(ShapeError, match="a grid of 2 x 2 x 2"):
        connector()(torch.zeros(1, 7, 6, dtype=torch.float64), (2, 2, 2))
