from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_scale.compressors.pooling import PixelShuffle, Pooling
from tests.compressors import golden

POOLED = golden.load("llava_next_get_2dpool")
SHUFFLED = golden.load("pixel_shuffle")
GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7))


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("mode", ["average", "max", "bilinear"])
@pytest.mark.parametrize("stride", [2, 3])
def test_pooling_pictures_is_that_of_llava_next(side, mode, stride):
    pool = Pooling(mode=mode, window=(1, stride, stride))
    out = pool(POOLED[f"side{side}_x"], (1, side, side))
    golden.assert_same(out.tokens, POOLED[f"side{side}_{mode}_stride{stride}"])


@pytest.mark.parametrize("window", [(2, 1, 1), (4, 2, 2), (8, 4, 4)])
def test_pooling_clips_is_that_of_vila(window):
    arrays = golden.load("vila_tsp_pool")
    out = Pooling(window=window)(arrays["x"].reshape(1, 128, 3), (8, 4, 4))
    golden.assert_same(out.tokens, arrays["pool_" + "_".join(map(str, window))].reshape(1, -1, 3))


@pytest.mark.parametrize(
    ("name", "x", "factor"),
    [
        ("smolvlm_scale2", "x", 2),
        ("smolvlm_scale3", "x", 3),
        ("internvl_half", "x", 2),
        ("vila_2x2_even", "x", 2),
        ("vila_3x3", "x", 3),
        ("vila_2x2_odd", "x7", 2),
        ("vila_3x3_odd", "x7", 3),
    ],
)
def test_pixel_shuffle_has_the_channel_order_of_every_family(name, x, factor):
    tokens, side = SHUFFLED[x], 6 if x == "x" else 7
    out = PixelShuffle(factor=factor)(tokens.reshape(tokens.shape[0], side * side, -1), (1, side, side))
    golden.assert_same(out.tokens, SHUFFLED[name].flatten(1, -2))


@given(grid=GRIDS, mode=st.sampled_from(["average", "max", "bilinear"]), window=st.tuples(*[st.integers(1, 4)] * 3))
def test_pooled_counts_and_anchors_are_as_promised(grid, mode, window):
    pool = Pooling(mode=mode, window=window)
    check_promises(pool, grid)


@given(grid=GRIDS, factor=st.integers(1, 4))
def test_shuffled_counts_anchors_and_sizes_are_as_promised(grid, factor):
    out = check_promises(PixelShuffle(factor=factor), grid)
    assert (out.sizes.sum(dim=1) == grid[0] * grid[1] * grid[2]).all()


def check_promises(compressor, grid):
    """Counts, widths and order of ``compressor`` on ``grid``."""
    x = torch.randn(2, grid[0] * grid[1] * grid[2], 3)
    out = compressor(x, grid)
    assert out.tokens.shape == (2, compressor.num_tokens(grid, None), compressor.out_width(3))
    assert out.positions.shape == out.sizes.shape == out.tokens.shape[:2]
    assert (out.positions.diff(dim=1) > 0).all()
    assert 0 <= out.positions.min() <= out.positions.max() < x.shape[1]
    assert (out.sizes >= 1).all()
    assert not compressor.needs_instruction
    assert not compressor.needs_signals
    return out


def test_a_shorter_last_window_in_time_is_pooled_too():
    x = torch.arange(5.0).view(1, 5, 1)
    out = Pooling(window=(2, 1, 1))(x, (5, 1, 1))
    assert out.tokens.flatten().tolist() == [0.5, 2.5, 4.0]
    assert out.sizes.tolist() == [[2, 2, 1]]
    assert Pooling(mode="max", window=(2, 1, 1))(x, (5, 1, 1)).tokens.flatten().tolist() == [1, 3, 4]


def test_each_place_knows_its_window():
    x = torch.randn(2, 2 * 5 * 4, 3)
    out = Pooling(window=(2, 2, 2))(x, (2, 5, 4))
    group = out.group[0].view(2, 5, 4)
    assert group[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3], [-1, -1, -1, -1]]
    assert torch.equal(group[0], group[1])
    mean = x[0][out.group[0] == 3].mean(dim=0)
    torch.testing.assert_close(out.tokens[0, 3], mean)
    shuffled = PixelShuffle(factor=2)(x, (2, 5, 4)).group[0].view(2, 5, 4)
    assert shuffled[1, 4].tolist() == [10, 10, 11, 11]
    assert Pooling(mode="bilinear")(x, (2, 5, 4)).group is None
