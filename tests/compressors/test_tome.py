from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPVisionModel

from llava_scale.compressors.blocks import SignalTap, find_blocks
from llava_scale.compressors.merging import apply_merge
from llava_scale.compressors.schedule import RatioSchedule
from llava_scale.compressors.tome import TomeCount, TomeInBlocks, block_removals, match_alternate
from llava_scale.errors import ConfigError
from tests.compressors import golden
from tests.model.parts import TOWERS

MATCHING = golden.cases("tome_bipartite_soft_matching")


def vision_model(name):
    model_class, config = TOWERS[name]
    torch.manual_seed(0)
    return model_class(config).eval()


def pixels():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def in_raster_order(rows, source):
    """Official output rows in the order of their anchors: the odd token of each, or its only one."""
    place = torch.arange(source.shape[2])
    anchors = torch.where(
        (source * (place % 2)).any(dim=2), (source * (place % 2) * place).amax(2), (source * place).amax(2)
    )
    order = anchors.argsort(dim=1)
    return rows.gather(1, order.unsqueeze(-1).expand_as(rows))


@pytest.mark.parametrize("case", MATCHING, ids=lambda case: str(case["args"].tolist()))
def test_merging_and_tracking_are_tomes(case):
    removed, num_class, num_distill = case["args"].tolist()
    x, prefix = case["x"], num_class + num_distill
    removed = min(removed, (x.shape[1] - prefix) // 2)
    plan = match_alternate(case["metric"], removed, prefix)
    out = apply_merge(x, plan)
    source = torch.nn.functional.one_hot(plan.group, plan.kept.shape[1]).transpose(1, 2)
    if not removed:
        assert torch.equal(case["merge_mean"], x)
        golden.assert_same(out.tokens, x)
        return
    golden.assert_same(source, in_raster_order(case["source"], case["source"]))
    golden.assert_same(out.tokens, in_raster_order(case["merge_mean"], case["source"]))
    golden.assert_same(out.tokens, in_raster_order(case["wavg_x"], case["source"]))
    golden.assert_same(
        out.tokens * out.sizes.unsqueeze(-1).to(x.dtype), in_raster_order(case["merge_sum"], case["source"])
    )
    golden.assert_same(out.sizes.to(x.dtype), in_raster_order(case["wavg_size"], case["source"]).squeeze(-1))
    unmerged = out.tokens.gather(1, plan.group.unsqueeze(-1).expand_as(x))
    if num_distill:
        # the official unmerge takes the distillation token, which its merge puts second, for one that was left
        num_left = x.shape[1] // 2 - removed
        golden.assert_same(case["merge_mean"][:, num_left:], case["unmerge_of_mean"][:, 1::2])
    else:
        golden.assert_same(unmerged, case["unmerge_of_mean"])


@pytest.mark.parametrize("case", [c for c in MATCHING if "round2_r" in c], ids=lambda case: str(case["args"].tolist()))
def test_a_second_round_carries_sizes_and_sources_on(case):
    # its tokens stand in the official order (those left | destinations), as its fresh metric does
    _, num_class, num_distill = case["args"].tolist()
    plan = match_alternate(case["round2_metric"], int(case["round2_r"]), num_class + num_distill)
    out = apply_merge(case["wavg_x"], plan, case["wavg_size"].squeeze(-1))
    second = torch.nn.functional.one_hot(plan.group, plan.kept.shape[1]).transpose(1, 2).float()
    source = second @ case["source"].float()

    def by_members(rows, members):
        code = (members.double() * 2.0 ** torch.arange(members.shape[2])).sum(2)
        return rows.gather(1, code.argsort(dim=1).unsqueeze(-1).expand_as(rows))

    expected = case["round2_source"]
    golden.assert_same(by_members(source, source).long(), by_members(expected, expected).long())
    golden.assert_same(by_members(out.tokens, source), by_members(case["round2_wavg_x"], expected))
    sizes = out.sizes.unsqueeze(-1).to(out.tokens.dtype)
    golden.assert_same(by_members(sizes, source), by_members(case["round2_wavg_size"], expected))


def test_numbers_of_each_block_are_tomes():
    arrays = golden.load("tome_parse_r")
    layers = int(arrays["layers"])
    for name, removed, inflect in (
        ("r_const8", 8, 0.0),
        ("r_list", [5, 4, 3], 0.0),
        ("r_decr16", 16, -1.0),
        ("r_incr16", 16, 1.0),
        ("r_half", 10, 0.5),
    ):
        assert block_removals(layers, removed, inflect=inflect) == arrays[name].tolist()


@given(
    num_patches=st.integers(1, 600),
    num_blocks=st.integers(1, 24),
    ratio=st.floats(0, 0.9),
    inflect=st.floats(-1, 1),
)
def test_blocks_remove_together_what_the_ratio_asks_for(num_patches, num_blocks, ratio, inflect):
    count = TomeCount(schedule=RatioSchedule(final=ratio), num_blocks=num_blocks, inflect=inflect)
    removals = count.removals(num_patches, None)
    wanted = num_patches - count.schedule.num_kept(num_patches, None)
    left = num_patches
    for removed in removals:
        assert 0 <= removed <= left // 2
        left -= removed
    assert left >= num_patches - wanted
    if ratio <= 0.5 or (num_blocks >= 8 and inflect <= 0):  # what rises late may find too few tokens left
        assert abs(left - (num_patches - wanted)) <= max(0, num_patches // 2**num_blocks)
    assert count.num_tokens((3, 1, num_patches), None) == 3 * left


def test_attention_is_proportional_to_the_sizes():
    arrays = golden.load("tome_proportional_attention")
    x, num_heads = arrays["x"], int(arrays["num_heads"])
    qkv = torch.nn.functional.linear(x, arrays["qkv_weight"], arrays["qkv_bias"])
    q, k, v = (part.view(2, 7, num_heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    golden.assert_same(k.mean(1), arrays["key_mean"])
    tome = TomeInBlocks(vision_model("clip"), 1)
    merged = apply_merge(x, match_alternate(x, 1, 0), None)
    for size, expected in ((arrays["size"], arrays["out"]), (None, arrays["out_without_size"])):
        tome._merged = None if size is None else merged._replace(sizes=size.squeeze(-1))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=tome.bias(x))
        out = out.transpose(1, 2).flatten(2)
        golden.assert_same(torch.nn.functional.linear(out, arrays["proj_weight"], arrays["proj_bias"]), expected)


@pytest.mark.parametrize(("name", "num_prefix"), [("clip", 1), ("siglip", 0), ("dinov2", 1), ("vit", 1)])
def test_a_tower_loses_the_tokens_it_should_and_keeps_its_names(name, num_prefix):
    model = vision_model(name)
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(pixel_values=pixels()).last_hidden_state
        tome = TomeInBlocks(model, num_prefix)
        assert list(model.state_dict()) == names
        torch.testing.assert_close(model(pixel_values=pixels()).last_hidden_state, before)
        with tome.merging([4, 0, 2]):
            features = model(pixel_values=pixels()).last_hidden_state
    assert features.shape == (2, num_prefix + 10, 16)
    out = tome.result(features[:, num_prefix:])
    assert out.tokens.shape == (2, 10, 16)
    assert (out.positions.diff(dim=1) > 0).all()
    assert 0 <= out.positions.min() <= out.positions.max() <= 15
    assert out.sizes.sum(1).tolist() == [16, 16]
    assert torch.equal(out.group.gather(1, out.positions), torch.arange(10).expand(2, -1))


def test_merging_equal_patches_changes_nothing():
    model = vision_model("siglip")
    with torch.no_grad():
        for parameter in model.embeddings.position_embedding.parameters():
            parameter.zero_()
        flat = torch.full((1, 3, 16, 16), 0.3)
        before = model(pixel_values=flat).last_hidden_state
        tome = TomeInBlocks(model, 0)
        with tome.merging([5, 3, 2]):
            after = model(pixel_values=flat).last_hidden_state
    torch.testing.assert_close(after, before[:, :6])


def test_gradients_flow_through_merged_blocks_and_copies_are_their_own():
    model = vision_model("clip")
    tome = TomeInBlocks(model, 1)
    copied, other = copy.deepcopy((model, tome))
    with tome.merging([4, 2, 2]):
        model(pixel_values=pixels()).last_hidden_state.square().sum().backward()
    assert all(parameter.grad is not None for block in find_blocks(model) for parameter in block.parameters())
    with torch.no_grad():
        assert copied(pixel_values=pixels()).last_hidden_state.shape[1] == 17
        with other.merging([1, 1, 1]):
            assert copied(pixel_values=pixels()).last_hidden_state.shape[1] == 14


@pytest.mark.parametrize(("name", "num_prefix"), [("clip", 1), ("siglip", 0), ("dinov2", 1), ("vit", 1)])
def test_signals_are_those_of_the_last_attention(name, num_prefix):
    model = vision_model(name)
    tap = SignalTap(model, num_prefix)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(pixel_values=pixels(), output_attentions=True).attentions[-1]
    signals = tap.signals()
    expected = attention[:, :, 0] if num_prefix else attention.mean(2)
    torch.testing.assert_close(signals.saliency, expected.mean(1)[:, num_prefix:])
    assert signals.keys.shape == (2, 16, 8)


def test_towers_without_known_blocks_are_refused():
    with pytest.raises(ConfigError, match="knows those of CLIP"):
        TomeInBlocks(nn.Sequential(nn.Linear(2, 2)), 0)
    assert isinstance(vision_model("clip"), CLIPVisionModel)
