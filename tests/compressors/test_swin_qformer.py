from __future__ import annotations

import pytest
import torch

from llava_scale.compressors.base import Context, Instruction
from llava_scale.compressors.positions import position_parts, sincos_position
from llava_scale.compressors.swin_qformer import LegacySwinQFormer, SwinQFormer
from llava_scale.errors import ShapeError
from tests.compressors import golden


def swin(**settings):
    torch.manual_seed(0)
    sizes = {"instruction_width": 6, "width": 16, "num_queries": 5, "num_layers": 2, "num_heads": 4, "window": 8}
    return SwinQFormer(12, **{**sizes, **settings}).double()


def question(num_batch=2, length=4, mask=None):
    torch.manual_seed(1)
    features = torch.randn(num_batch, length, 6, dtype=torch.float64)
    return Instruction(features, torch.ones(num_batch, length, dtype=torch.bool) if mask is None else mask)


def tokens(num_tokens=24, num_batch=2):
    torch.manual_seed(2)
    return torch.randn(num_batch, num_tokens, 12, dtype=torch.float64)


def test_the_legacy_form_is_the_original_forward_and_backward():
    arrays = golden.load("seed_swinqformer_forward")
    num_queries, window = int(arrays["num_queries"]), int(arrays["window_size"])
    module = LegacySwinQFormer(12, instruction_width=10, width=16, num_queries=num_queries, window=window).double()
    module.load_state_dict({name[6:]: value for name, value in arrays.items() if name.startswith("param.")})
    x = arrays["x"].clone().requires_grad_()
    mask = torch.ones(arrays["instruction_features"].shape[:2], dtype=torch.bool)
    context = Context(instruction=Instruction(arrays["instruction_features"], mask))
    out = module(x, (1, 5, 6), context)
    golden.assert_same(out.tokens, arrays["out"])
    grad_x, grad_queries = torch.autograd.grad(out.tokens.square().sum(), (x, module.Queries))
    golden.assert_same(grad_x, arrays["grad_x_of_sum_sq"])
    golden.assert_same(grad_queries, arrays["grad_queries_of_sum_sq"])


def test_each_frame_gets_its_queries_or_the_whole_clip_does():
    for scope, count in (("frame", 15), ("clip", 5)):
        module = swin(scope=scope)
        out = module(tokens(), (3, 2, 4), Context(instruction=question()))
        assert out.tokens.shape == (2, count, 16)
        assert module.num_tokens((3, 2, 4), 7) == module.count.num_tokens((3, 2, 4), None) == count
        assert module.out_width(12) == 16
        assert (out.positions.diff(dim=1) >= 0).all()
        assert out.sizes.sum(dim=1).tolist() == pytest.approx([24, 24])


def test_a_frame_of_a_clip_is_answered_like_a_picture():
    module, x = swin(), tokens()
    clip = module(x, (3, 2, 4), Context(instruction=question()))
    picture = module(x[:, 8:16], (1, 2, 4), Context(instruction=question()))
    torch.testing.assert_close(clip.tokens[:, 5:10], picture.tokens)


def test_the_question_changes_the_answers_and_its_padding_does_not():
    module, x = swin(), tokens()
    asked = module(x, (1, 4, 6), Context(instruction=question())).tokens
    other = question()._replace(features=question().features.flip(0))
    assert not torch.allclose(asked, module(x, (1, 4, 6), Context(instruction=other)).tokens)
    padded = Instruction(
        torch.cat([question().features, torch.full((2, 3, 6), 9.0, dtype=torch.float64)], dim=1),
        torch.tensor([[True] * 4 + [False] * 3] * 2),
    )
    torch.testing.assert_close(module(x, (1, 4, 6), Context(instruction=padded)).tokens, asked)


def test_no_question_and_an_empty_one_are_the_same_learned_thing():
    module, x = swin(), tokens()
    without = module(x, (1, 4, 6)).tokens
    empty = question(mask=torch.tensor([[False] * 4, [True] * 4]))
    some = module(x, (1, 4, 6), Context(instruction=empty)).tokens
    torch.testing.assert_close(some[0], without[0])
    assert not torch.allclose(some[1], without[1])
    (without * torch.randn_like(without)).sum().backward()
    assert module.null_instruction.grad.abs().max() > 1e-6


def test_without_an_instruction_tower_no_question_is_read():
    module, x = swin(instruction_width=0), tokens()
    assert not module.needs_instruction
    assert not any("read" in name or "instruction" in name for name, _ in module.named_parameters())
    assert module(x, (1, 4, 6)).tokens.shape == (2, 5, 16)


@pytest.mark.parametrize("position", ["sincos", "none"])
def test_a_query_sees_its_window_and_no_further(position):
    module = swin(pooled_queries=False, position=position, window=6)
    x = tokens()
    changed = x.clone()
    changed[:, 20] += 1
    before, after = (module(values, (1, 4, 6)).tokens for values in (x, changed))
    sees = [20 in window for window in module.windows(24)]
    assert True in sees
    assert False in sees
    for number, seen in enumerate(sees):
        assert torch.equal(before[:, number], after[:, number]) != seen


def test_the_order_of_the_tokens_matters():
    module, x = swin(window=64, pooled_queries=False), tokens()
    shuffled = module(x[:, torch.randperm(24)], (1, 4, 6)).tokens
    assert (module(x, (1, 4, 6)).tokens - shuffled).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [{}, {"window": 2}, {"num_queries": 1}, {"pooled_queries": False}])
def test_every_parameter_gets_a_gradient(settings):
    module = swin(**settings)
    mask = torch.tensor([[False] * 4, [True] * 4])
    module(tokens(), (1, 4, 6), Context(instruction=question(mask=mask))).tokens.square().sum().backward()
    names = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert names == []


def test_gradients_are_right(monkeypatch):
    monkeypatch.setattr("llava_scale.compressors.window_attention.DENSE_UP_TO", 0)  # also through the groups
    module = swin(num_layers=1, window=3)
    x = tokens(12).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: module(x, (1, 3, 4), Context(instruction=question())).tokens, (x,), atol=1e-4
    )


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "grouped"])
def test_tokens_that_are_never_projected_give_the_same(monkeypatch, dense):
    monkeypatch.setattr("llava_scale.compressors.window_attention.DENSE_UP_TO", 10**6 if dense else 0)
    module, x = swin(), tokens().requires_grad_()
    results = []
    for threshold in (0, 10**6):
        monkeypatch.setattr("llava_scale.compressors.normed_tokens.ABSORB_FROM", threshold)
        out = module(x, (1, 4, 6), Context(instruction=question())).tokens
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()], allow_unused=True)))
    for absorbed, projected in zip(*results, strict=True):
        torch.testing.assert_close(absorbed, projected)


def test_half_precision_stays_half():
    module = swin().to(torch.bfloat16)
    out = module(tokens().to(torch.bfloat16), (1, 4, 6), Context(instruction=question())).tokens
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("way", ["dense", "grouped", "absorbed"])
def test_it_compiles_into_one_graph_with_the_same_result(monkeypatch, way):
    if way != "dense":
        monkeypatch.setattr("llava_scale.compressors.window_attention.DENSE_UP_TO", 0)
    if way == "absorbed":
        monkeypatch.setattr("llava_scale.compressors.normed_tokens.ABSORB_FROM", 0)
    torch._dynamo.reset()
    module, x = swin(num_layers=1), tokens().requires_grad_()
    compiled = torch.compile(lambda x: module(x, (1, 4, 6)).tokens, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), module(x, (1, 4, 6)).tokens
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(answers.square().sum(), x)[0] for answers in (out, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("position", ["sincos", "none"])
@pytest.mark.parametrize("grid", [(1, 3, 4), (2, 2, 3), (1, 1, 12)])
def test_gradients_of_tokens_that_are_never_projected_are_right(monkeypatch, position, grid):
    monkeypatch.setattr("llava_scale.compressors.normed_tokens.ABSORB_FROM", 0)
    module = swin(num_layers=1, window=3, scope="clip", position=position)
    x = tokens(12).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x, grid, Context(instruction=question())).tokens, (x,), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sixteen_bits_that_are_never_projected_stay_near_the_exact_answer(monkeypatch, dtype):
    monkeypatch.setattr("llava_scale.compressors.normed_tokens.ABSORB_FROM", 0)
    module, x = swin(), tokens()
    exact = module(x, (1, 4, 6)).tokens
    near = module.to(dtype)(x.to(dtype), (1, 4, 6)).tokens
    assert near.dtype == dtype
    torch.testing.assert_close(near.double(), exact, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=0.02)


def test_under_autocast_groups_and_whole_give_nearly_the_same(monkeypatch):
    module, x = swin().float(), tokens().float()
    exact = module(x, (1, 4, 6)).tokens
    monkeypatch.setattr("llava_scale.compressors.window_attention.DENSE_UP_TO", 0)
    for threshold in (0, 10**6):
        monkeypatch.setattr("llava_scale.compressors.normed_tokens.ABSORB_FROM", threshold)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(x, (1, 4, 6)).tokens
        torch.testing.assert_close(out.float(), exact, atol=0.1, rtol=0.05)
        out.float().square().sum().backward()


def test_positions_tell_all_places_apart():
    position = sincos_position((2, 3, 4), 20, like=torch.zeros(1, dtype=torch.float64))
    assert position.shape == (24, 20)
    assert torch.cdist(position, position).add(torch.eye(24)).min() > 0.1
    assert sincos_position((1, 2, 2), 4, like=torch.zeros(1)).shape == (4, 4)


@pytest.mark.parametrize("grid", [(2, 3, 4), (1, 5, 5), (1, 1, 24), (3, 1, 8)])
def test_positions_are_the_product_of_their_parts(grid):
    num_tokens = grid[0] * grid[1] * grid[2]
    like = torch.zeros(1, dtype=torch.float64)
    whole = sincos_position(grid, 20, like=like)
    for start in range(num_tokens):
        for stop in range(start + 1, num_tokens + 1):
            has, adds = position_parts(grid, range(start, stop), 20, like=like)
            torch.testing.assert_close(has @ adds, whole[start:stop])


def test_tokens_that_do_not_lie_on_the_grid_are_refused():
    with pytest.raises(ShapeError, match="needs"):
        swin()(tokens(), (1, 4, 5))


@pytest.mark.parametrize("legacy", [False, True])
def test_recorded_attention_is_what_the_answers_are_made_of(legacy):
    from llava_scale.compressors.swin_qformer import LegacySwinQFormer, SwinQFormer, recorded_attention

    torch.manual_seed(0)
    if legacy:
        module = LegacySwinQFormer(6, instruction_width=4, width=8, num_queries=4, window=7)
        looker = module
    else:
        module = SwinQFormer(6, instruction_width=0, width=8, num_queries=4, num_layers=1, num_heads=2, window=7)
        looker = module.layers[0].look
    module, x = module.double(), torch.randn(2, 20, 6, dtype=torch.float64)
    with recorded_attention(module) as seen:
        module(x, (2, 2, 5))
    assert [tuple(weights.shape) for weights in seen] == [(4, 1 if legacy else 2, 4, 10)]
    assert looker.recorder is None
    windows = module.windows(10)
    for number, window in enumerate(windows):
        assert torch.equal(seen[0][:, :, number].sum(-1) - seen[0][:, :, number, list(window)].sum(-1) < 1e-6,
                           torch.ones(4, seen[0].shape[1], dtype=torch.bool))  # fmt: skip
    if legacy:
        value = module.norm(module.to_kv_mmodal(x.view(4, 10, 6)).chunk(2, dim=-1)[1])
        answers = module.norm(module.to_out_mmodal((seen[0].double() @ value.unsqueeze(1)).squeeze(1)))
        torch.testing.assert_close(module(x, (2, 2, 5)).tokens, answers.view(2, 8, 8), atol=1e-5, rtol=1e-5)


def test_window_weights_times_values_are_window_attention():
    from llava_scale.compressors.window_attention import query_windows, window_attention, window_weights

    query, key, value = (torch.randn(2, 3, number, 4, dtype=torch.float64) for number in (5, 40, 40))
    windows = query_windows(num_tokens=40, num_queries=5, width=9)
    weights = window_weights(query, key, windows).double()
    torch.testing.assert_close(weights @ value, window_attention(query, key, value, windows), atol=1e-6, rtol=1e-5)
