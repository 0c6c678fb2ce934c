from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_scale.compressors.base import Context, TowerSignals
from llava_scale.compressors.schedule import RatioSchedule
from llava_scale.compressors.token_merging import LocalTokenMerging, fit_window
from llava_scale.errors import ShapeError
from tests.compressors import golden

TOMESD = golden.cases("tomesd_bipartite_soft_matching_random2d")
ORIGINAL = golden.cases("seed_local_token_merging")


def merging(ratio=0.5, **settings_):
    return LocalTokenMerging(schedule=RatioSchedule(final=ratio), **settings_)


@st.composite
def situations(draw):
    """A merging module and tokens on some grid."""
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)))
    module = merging(
        ratio=draw(st.floats(0, 0.95)),
        window=draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))),
        scope=draw(st.sampled_from(["frame", "clip", "window"])),
        mode=draw(st.sampled_from(["merge", "prune"])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    num_batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    x = torch.randn(num_batch, grid[0] * grid[1] * grid[2], width, generator=generator, dtype=torch.float64)
    return module, x, grid, Context(step=draw(st.none() | st.integers(0, 5)))


@given(situation=situations())
@settings(max_examples=150, deadline=None)
def test_the_length_is_as_promised_and_the_order_of_the_picture_is_kept(situation):
    module, x, grid, context = situation
    out = module(x, grid, context)
    num_tokens = module.num_tokens(grid, context.step)
    assert out.tokens.shape == (x.shape[0], num_tokens, x.shape[2])
    assert out.positions.shape == out.sizes.shape == (x.shape[0], num_tokens)
    assert (out.positions.diff(dim=1) > 0).all()
    assert 0 <= out.positions.min() <= out.positions.max() < x.shape[1]


@given(situation=situations())
@settings(max_examples=150, deadline=None)
def test_every_token_goes_into_exactly_one_output_with_weights_that_sum_to_one(situation):
    module, x, grid, context = situation
    out = module(x, grid, context)
    num_tokens = out.tokens.shape[1]
    members = (out.group.unsqueeze(1) == torch.arange(num_tokens).unsqueeze(1)).double()  # (B, M, N)
    assert torch.equal(members.sum(2), out.sizes.double())
    if module.mode == "merge":
        assert torch.equal(members.sum(1), torch.ones(x.shape[:2], dtype=torch.float64))
        torch.testing.assert_close(out.tokens, members / members.sum(2, keepdim=True) @ x)
    else:
        assert (members.sum(1) <= 1).all()
        assert torch.equal(out.tokens, members @ x)
    assert torch.equal(out.group.gather(1, out.positions), torch.arange(num_tokens).expand(x.shape[0], -1))


@given(situation=situations())
@settings(max_examples=60, deadline=None)
def test_media_never_mix(situation):
    module, x, grid, context = situation
    together = module(x, grid, context)
    for number in range(x.shape[0]):
        alone = module(x[number : number + 1], grid, context)
        torch.testing.assert_close(together.tokens[number], alone.tokens[0])
        assert torch.equal(together.group[number], alone.group[0])


@given(grid=st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(2, 6)), ratio=st.floats(0, 0.9))
@settings(max_examples=50, deadline=None)
def test_identical_tokens_merge_to_themselves(grid, ratio):
    token = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    x = token.expand(1, grid[0] * grid[1] * grid[2], -1)
    out = merging(ratio)(x, grid)
    torch.testing.assert_close(out.tokens, token.expand_as(out.tokens))


@given(seed=st.integers(0, 1000), num_unique=st.integers(1, 11), mode=st.sampled_from(["merge", "prune"]))
@settings(max_examples=80, deadline=None)
def test_unique_tokens_stay_while_duplicates_remain(seed, num_unique, mode):
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(8, generator=generator, dtype=torch.float64)
    x = plain.repeat(1, 36, 1)
    unique = torch.randperm(36, generator=generator)[:num_unique]
    x[0, unique] = torch.randn(num_unique, 8, generator=generator, dtype=torch.float64)
    # Every duplicate in a source's place is as good as its destination as long as one destination is a duplicate.
    out = merging(0.33, mode=mode)(x, (1, 6, 6))
    dst = {0, 2, 4, 12, 14, 16, 24, 26, 28}
    num_removable = sum(i not in dst for i in range(36) if i not in unique.tolist())
    has_plain_dst = bool(dst - set(unique.tolist()))
    assert out.tokens.shape[1] == 25
    if num_removable >= 11 and has_plain_dst:
        assert set(unique.tolist()) <= set(out.positions[0].tolist())
        for position in unique.tolist():
            assert (out.tokens[0] - x[0, position]).abs().sum(-1).min() < 1e-12


@pytest.mark.parametrize("case", TOMESD, ids=lambda case: f"r{int(case['r'])}")
def test_merging_is_that_of_tome_sd_in_raster_order(case):
    rows, cols = case["grid_hw"].tolist()
    high, wide = case["window_yx"].tolist()
    module = merging(int(case["r"]) / (rows * cols), window=(1, high, wide))
    if int(case["r"]) >= rows * cols:
        module = merging(0.99, window=(1, high, wide))  # as many as can merge
    out = module(case["x"], (1, rows, cols), offsets=case["rand_offset"])
    if not int(case["r"]):
        assert torch.equal(out.tokens, case["x"])
        assert torch.equal(case["merged"], case["x"])
        return
    golden.assert_same(out.tokens, case["op_tokens"])
    golden.assert_same(out.positions, case["op_position_ids"])
    golden.assert_same(out.sizes, case["op_size"])
    golden.assert_same(out.group, case["op_group"])
    unmerged = out.tokens.gather(1, out.group.unsqueeze(-1).expand_as(case["x"]))
    golden.assert_same(unmerged, case["unmerged"])
    assert set(case["dst_index"].tolist()) <= set(out.positions[0].tolist())
    # the official order is (unmerged | destinations): the same set of tokens
    by_first = [tokens[tokens[:, 0].argsort()] for tokens in (out.tokens[0], case["merged"][0])]
    golden.assert_same(by_first[0], by_first[1])
    pruned = merging(module.schedule.final, window=(1, high, wide), mode="prune")
    golden.assert_same(pruned(case["x"], (1, rows, cols), offsets=case["rand_offset"]).tokens, case["op_pruned"])


@pytest.mark.parametrize("case", ORIGINAL, ids=lambda case: f"{case['x'].shape[1]}")
def test_pruning_drops_what_the_original_meant_to_drop(case):
    rows, cols = case["grid_hw"].tolist()
    stride = int(case["stride"])
    module = merging(float(case["ratio"]), window=(1, stride, stride), mode="prune")
    out = module(case["x"], (1, rows, cols), offsets=case["rand_offset"])
    golden.assert_same(out.positions, case["intended_kept_index"])
    assert out.positions.shape == case["seed_kept_index"].shape
    assert not torch.equal(out.positions, case["seed_kept_index"])  # which it did not do
    kept = case["seed_kept_index"]
    golden.assert_same(case["x"].gather(1, kept.unsqueeze(-1).expand_as(case["seed_out"])), case["seed_out"])


@pytest.mark.parametrize("scope", ["frame", "window", "clip"])
def test_scopes_bound_where_a_token_may_go(scope):
    torch.manual_seed(0)
    grid = (3, 4, 6)
    x = torch.randn(2, 72, 5)
    out = merging(0.7, scope=scope)(x, grid)
    anchor = out.positions.gather(1, out.group)
    place = torch.arange(72)
    same_frame = anchor // 24 == place // 24
    window = (place // 24, place % 24 // 6 // 2, place % 6 // 2)
    anchor_window = (anchor // 24, anchor % 24 // 6 // 2, anchor % 6 // 2)
    same_window = torch.stack([a == b for a, b in zip(anchor_window, window, strict=True)]).all(0)
    assert (anchor != place).any()
    assert same_frame.all() == (scope != "clip")
    assert same_window.all() == (scope == "window")


def test_windows_over_frames_merge_a_still_scene_in_time():
    torch.manual_seed(0)
    still = torch.randn(1, 1, 16, 8).expand(1, 4, 16, 8).reshape(1, 64, 8)
    out = merging(0.5, window=(2, 2, 2))(still, (4, 4, 4))
    assert out.tokens.shape[1] == 32
    anchor = out.positions.gather(1, out.group)
    exact = (still.gather(1, anchor.unsqueeze(-1).expand_as(still)) - still).abs().amax(-1) == 0
    moved = anchor != torch.arange(64)
    assert (moved & exact).sum() >= 8  # copies of another frame went first
    assert ((anchor - torch.arange(64)).abs() >= 16).any()


def test_windows_shrink_to_the_grid_and_in_time_to_a_divisor():
    assert fit_window((4, 2, 2), (6, 1, 8)) == (3, 1, 2)
    assert fit_window((2, 2, 2), (7, 5, 5)) == (1, 2, 2)
    assert fit_window((2, 3, 3), (1, 8, 8)) == (1, 3, 3)


@pytest.mark.parametrize("step", [0, 3, 6, 9, 12, None])
def test_gradients_are_right_at_every_step_of_the_ramp(step):
    module = LocalTokenMerging(schedule=RatioSchedule(final=0.5, warmup_steps=12))
    torch.manual_seed(0)
    x = torch.randn(2, 36, 3, dtype=torch.float64, requires_grad=True)
    sizes = torch.rand(2, 36, dtype=torch.float64) + 0.5
    context = Context(step=step)
    assert torch.autograd.gradcheck(lambda x: module(x, (1, 6, 6), context).tokens, (x,), eps=1e-8, atol=1e-6)
    if step is None:
        weighted = lambda x: module(x, (1, 6, 6), context, sizes=sizes).tokens  # noqa: E731
        assert torch.autograd.gradcheck(weighted, (x,), eps=1e-8, atol=1e-6)


def test_sizes_weigh_the_mean_and_add_up():
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    out = merging(0.25, window=(1, 1, 4))(x, (1, 1, 4), sizes=torch.tensor([[3.0, 1.0, 1.0, 1.0]]))
    assert out.group.tolist() == [[0, 0, 1, 2]]
    assert out.sizes.tolist() == [[4.0, 1.0, 1.0]]
    torch.testing.assert_close(out.tokens[0, 0], torch.tensor([1.25, 0.0]))


def test_random_destinations_change_with_the_step_only_and_not_at_evaluation():
    torch.manual_seed(0)
    x = torch.randn(1, 64, 4)
    module = merging()
    positions = [module(x, (1, 8, 8), Context(step=step)).positions for step in (1, 1, 2, None, None)]
    assert torch.equal(positions[0], positions[1])
    assert not torch.equal(positions[0], positions[2])
    assert torch.equal(positions[3], positions[4])
    fixed = merging(destination="first")
    assert torch.equal(fixed(x, (1, 8, 8), Context(step=1)).positions, positions[3])


@pytest.mark.parametrize("matrix_units", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_merge_like_thirty_two(dtype, matrix_units, monkeypatch):
    monkeypatch.setattr("llava_scale.compressors.token_merging._HAS_MATRIX_UNITS", matrix_units)
    torch.manual_seed(0)
    x = torch.randn(2, 144, 64) * 30 + 10 * torch.randn(64)
    x[0, 5] = 0  # a token of zeros must not poison the others
    exact = merging()(x, (1, 12, 12))
    half = merging()(x.to(dtype), (1, 12, 12))
    assert half.tokens.dtype == dtype
    assert torch.isfinite(half.tokens).all()
    same = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(exact.positions, half.positions, strict=True)]
    assert min(same) > 0.9 * 72
    wide = x.to(dtype)[:, :1].repeat(1, 144, 1)
    torch.testing.assert_close(merging()(wide, (1, 12, 12)).tokens, wide[:, :72])  # the mean of equals is exact


@pytest.mark.parametrize("mode", ["merge", "prune"])
def test_it_compiles_into_one_graph_with_the_same_result(mode):
    module = merging(mode=mode, window=(1, 2, 2))
    torch.manual_seed(0)
    x = torch.randn(2, 36, 8, requires_grad=True)
    compiled = torch.compile(lambda x: module(x, (1, 6, 6), Context(step=3)), fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), module(x, (1, 6, 6), Context(step=3))
    assert torch.equal(out.positions, expected.positions)
    torch.testing.assert_close(out.tokens, expected.tokens)
    (grad,) = torch.autograd.grad(out.tokens.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.tokens.square().sum(), x)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.slow
def test_one_compiled_graph_serves_every_step():
    module = merging()
    torch.manual_seed(0)
    x = torch.randn(2, 36, 8)
    compiled = torch.compile(lambda x, step: module(x, (1, 6, 6), Context(step=step)), fullgraph=True)
    for step in (3, 4, 123_456):
        out, expected = compiled(x, step), module(x, (1, 6, 6), Context(step=step))
        assert torch.equal(out.positions, expected.positions)
        torch.testing.assert_close(out.tokens, expected.tokens)


@pytest.mark.parametrize("scope", ["frame", "clip", "window"])
@pytest.mark.parametrize("window", [(1, 2, 2), (2, 2, 2), (1, 3, 2)])
def test_sixteen_bits_find_the_same_destinations_in_every_scope(scope, window):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (3, 4 * 30, 16), generator=generator).double()  # exact in sixteen bits
    module, context = merging(scope=scope, window=window), Context(step=5)
    wide, half = module(x, (4, 5, 6), context), module(x.bfloat16(), (4, 5, 6), context)
    assert (wide.group == half.group).float().mean() > 0.9  # equal scores may be ordered otherwise
    assert half.tokens.shape == wide.tokens.shape


def test_keys_of_the_tower_can_decide_what_is_alike():
    torch.manual_seed(0)
    x, keys = torch.randn(1, 36, 4), torch.randn(1, 36, 6)
    signals = TowerSignals(keys=keys, saliency=torch.zeros(1, 36))
    module = merging(metric="keys")
    out = module(x, (1, 6, 6), Context(signals=signals))
    assert module.needs_signals
    assert torch.equal(out.group, merging()(keys, (1, 6, 6)).group)
    assert out.tokens.shape == (1, 18, 4)


def test_tokens_that_do_not_lie_on_the_grid_are_refused():
    with pytest.raises(ShapeError, match="needs \\(B, 36, D\\) tokens"):
        merging()(torch.randn(1, 35, 4), (1, 6, 6))
    with pytest.raises(ShapeError, match="need as many offsets, got 4"):
        merging()(torch.randn(1, 36, 4), (1, 6, 6), offsets=torch.zeros(4, dtype=torch.int64))
