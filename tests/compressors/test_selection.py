from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_scale.compressors.base import Context, TowerSignals
from llava_scale.compressors.merging import plan_drop
from llava_scale.compressors.schedule import RatioSchedule
from llava_scale.compressors.selection import (
    DivPrune,
    RandomPrune,
    TemporalPrune,
    UniformPrune,
    VisionZip,
    most_diverse,
    temporal_change,
    zip_tokens,
)
from tests.compressors import golden

KINDS = [RandomPrune, UniformPrune, DivPrune, TemporalPrune, VisionZip]


@given(
    kind=st.sampled_from(KINDS),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    ratio=st.floats(0, 0.95),
    step=st.none() | st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_counts_and_order_are_as_promised(kind, grid, ratio, step):
    selection = kind(schedule=RatioSchedule(final=ratio))
    num_tokens = grid[0] * grid[1] * grid[2]
    x = torch.randn(2, num_tokens, 4)
    signals = TowerSignals(keys=torch.randn(2, num_tokens, 3), saliency=torch.rand(2, num_tokens))
    out = selection(x, grid, Context(step=step, signals=signals))
    assert out.tokens.shape == (2, selection.num_tokens(grid, step), selection.out_width(4))
    assert (out.positions.diff(dim=1) > 0).all()
    assert torch.equal(out.group.gather(1, out.positions), torch.arange(out.tokens.shape[1]).expand(2, -1))
    members = torch.stack([(out.group == number).sum(1) for number in range(out.tokens.shape[1])], dim=1)
    assert torch.equal(members.float(), out.sizes)
    if kind is not VisionZip:
        assert torch.equal(out.tokens, x.gather(1, out.positions.unsqueeze(-1).expand_as(out.tokens)))
    assert not selection.needs_instruction


@pytest.mark.parametrize("case", golden.cases("divprune"), ids=lambda case: f"{float(case['ratio'])}")
def test_the_diverse_tokens_are_those_of_divprune(case):
    wanted = case["selected_in_order"]
    assert most_diverse(case["x"][None], len(wanted))[0].tolist() == wanted.tolist()
    selection = DivPrune(schedule=RatioSchedule(final=1 - len(wanted) / len(case["x"])))
    assert selection(case["x"][None], (1, 1, len(case["x"]))).positions[0].tolist() == sorted(wanted.tolist())


@pytest.mark.parametrize("case", golden.cases("evs_retention_mask"), ids=lambda case: f"{float(case['q'])}")
def test_the_changing_tokens_are_those_of_evs(case):
    grid, keep = tuple(case["thw"].tolist()), case["keep"]
    plan = plan_drop(temporal_change(case["x"][None], grid, "cosine"), int(keep.sum()))
    assert plan.kept[0].tolist() == keep.nonzero().flatten().tolist()
    selection = TemporalPrune(schedule=RatioSchedule(final=1 - int(keep.sum()) / len(keep)))
    assert selection(case["x"][None], grid).positions[0].tolist() == keep.nonzero().flatten().tolist()


def test_pixel_differences_above_a_threshold_are_those_of_videollama3():
    arrays = golden.load("videollama3_compression_mask")
    grids, side = arrays["grid_thw"].tolist(), int(arrays["merge_sizes"][0])
    for threshold in (0.1, 0.3):
        masks, start = [], 0
        for frames, rows, cols in grids:
            size = frames * rows * cols
            # patches that become one token lie behind each other
            pixels = arrays["pixel_values"][start : start + size].reshape(1, size // side**2, -1)
            grid = (frames, rows // side, cols // side)
            masks.append(255 * temporal_change(pixels, grid, "l1")[0] > threshold)
            start += size
        expected = arrays[f"mask_thr{threshold}"]
        assert int((~expected).sum()) > 0, "nothing was dropped: the threshold was not tested"
        assert torch.equal(torch.cat(masks), expected)


@pytest.mark.parametrize("case", golden.cases("visionzip"), ids=lambda case: f"{case['metric'].shape[1]}")
def test_dominant_and_contextual_tokens_are_those_of_visionzip(case):
    num_dominant, num_contextual = case["dominant_contextual"].tolist()
    x, keys = case["hidden_states"][:, 1:], case["metric"][:, 1:]  # our towers have dropped the class token
    saliency = case["cls_attention"].sum(dim=1)[:, 1:]
    out = zip_tokens(x, keys, saliency, num_dominant, num_contextual)
    dominant = (case["dominant_index_with_cls"][:, 1:] - 1).sort(dim=1).values
    is_dominant = (out.positions.unsqueeze(2) == dominant.unsqueeze(1)).any(dim=2)
    expected = case["out"][:, 1:]  # dominant in raster order, then contextual
    width = x.shape[-1]
    golden.assert_same(out.tokens[is_dominant].view(len(x), -1, width), expected[:, :num_dominant])
    golden.assert_same(out.tokens[~is_dominant].view(len(x), -1, width), expected[:, num_dominant:])


def test_random_pruning_changes_with_the_step_and_is_fixed_at_evaluation():
    x = torch.randn(2, 36, 4)
    selection = RandomPrune(schedule=RatioSchedule(final=0.5))
    positions = [selection(x, (1, 6, 6), Context(step=step)).positions for step in (1, 1, 2, None, None)]
    assert torch.equal(positions[0], positions[1])
    assert not torch.equal(positions[0], positions[2])
    assert torch.equal(positions[3], positions[4])
    assert torch.equal(positions[3][0], positions[3][1])


def test_uniform_pruning_spreads_over_the_whole_picture():
    out = UniformPrune(schedule=RatioSchedule(final=0.75))(torch.randn(1, 16, 2), (1, 4, 4))
    assert out.positions.tolist() == [[2, 6, 10, 14]]


def test_pictures_keep_all_tokens_under_temporal_pruning():
    selection = TemporalPrune(schedule=RatioSchedule(final=0.9))
    x = torch.randn(2, 16, 2)
    assert torch.equal(selection(x, (1, 4, 4)).tokens, x)


def test_a_still_clip_keeps_its_first_frame():
    frame = torch.randn(1, 1, 16, 4)
    x = frame.expand(1, 4, 16, 4).reshape(1, 64, 4)
    for measure in ("cosine", "l1"):
        out = TemporalPrune(schedule=RatioSchedule(final=0.75), measure=measure)(x, (4, 4, 4))
        assert out.positions.tolist() == [list(range(16))]


@pytest.mark.parametrize("kind", [RandomPrune, VisionZip])
def test_gradients_flow_to_the_tokens(kind):
    torch.manual_seed(0)
    signals = TowerSignals(keys=torch.randn(1, 16, 3, dtype=torch.float64), saliency=torch.rand(1, 16))
    x = torch.randn(1, 16, 2, dtype=torch.float64, requires_grad=True)
    selection = kind(schedule=RatioSchedule(final=0.5))
    assert torch.autograd.gradcheck(lambda x: selection(x, (1, 4, 4), Context(signals=signals)).tokens, (x,))
