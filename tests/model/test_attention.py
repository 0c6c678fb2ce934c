from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from llava_scale.errors import ConfigError, ShapeError
from llava_scale.model import attention
from llava_scale.model.attention import PACKED, PackedLayout, packed_attention, packed_pass, register

register()

SMALL = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DECODERS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "mistral_window": MistralConfig(**SMALL, sliding_window=4),
    "qwen2_window": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "gemma3_window": Gemma3TextConfig(**SMALL, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
}


def decoder(name, implementation=PACKED):
    torch.manual_seed(0)
    config = copy.deepcopy(DECODERS[name])
    config._attn_implementation = implementation
    return AutoModelForCausalLM.from_config(config).eval()


def pack(samples):
    lengths = [len(sample) for sample in samples]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    ids = torch.tensor([token for sample in samples for token in sample])[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids, positions, offsets


def packed_logits(model, samples, **kwargs):
    ids, positions, offsets = pack(samples)
    layout = PackedLayout.of(offsets, row_length=ids.shape[1], device=ids.device)
    with packed_pass(implementation=PACKED):
        layout_kwargs = layout.attention_kwargs(PACKED)
        output = model(input_ids=ids, position_ids=positions, use_cache=False, **layout_kwargs, **kwargs)
    return list(torch.split(output.logits[0], list(layout.lengths)))


SAMPLES = [list(range(1, 10)), [11], list(range(20, 32)), [3, 5]]


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_packed_sample_gets_the_logits_it_gets_alone(name):
    packed = packed_logits(decoder(name), SAMPLES)
    reference = decoder(name, "eager")
    for sample, logits in zip(SAMPLES, packed, strict=True):
        alone = reference(input_ids=torch.tensor(sample)[None], use_cache=False).logits[0]
        assert torch.allclose(logits, alone, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral_window", "qwen2_window", "gemma3_window"])
@torch.no_grad()
def test_the_window_of_the_window_tests_matters(name):
    changed = [[2, *SAMPLES[0][1:]]]
    narrow = decoder(name)
    wide = decoder(name)
    wide.config.sliding_window = 100
    assert not torch.allclose(packed_logits(narrow, changed)[0][-1], packed_logits(wide, changed)[0][-1], atol=1e-6)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_changing_one_sample_leaves_its_neighbours_bit_equal(name):
    model = decoder(name)
    before = packed_logits(model, SAMPLES)
    after = packed_logits(model, [SAMPLES[0], [17], SAMPLES[2], SAMPLES[3]])
    assert not torch.equal(before[1], after[1])
    assert all(torch.equal(before[i], after[i]) for i in (0, 2, 3))


@torch.no_grad()
def test_gradient_checkpointing_keeps_samples_apart():
    model = decoder("llama").train()
    plain = packed_logits(model, SAMPLES)
    model.gradient_checkpointing_enable()
    with torch.enable_grad():
        checkpointed = packed_logits(model, SAMPLES)
        torch.cat(checkpointed).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.gradient_checkpointing_disable()
    model.zero_grad()
    with torch.enable_grad():
        torch.cat(packed_logits(model, SAMPLES)).sum().backward()
    assert torch.allclose(gradient, model.model.embed_tokens.weight.grad, atol=1e-6)


@torch.no_grad()
def test_a_padded_batch_is_as_with_sdpa():
    ids = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ours = decoder("llama")(input_ids=ids, attention_mask=mask).logits
    theirs = decoder("llama", "sdpa")(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_restarting_positions_without_offsets_still_keep_samples_apart():
    ids, positions, _ = pack(SAMPLES[:1] + SAMPLES[2:])
    model = decoder("llama")
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    alone = model(input_ids=torch.tensor(SAMPLES[2])[None], use_cache=False).logits[0]
    assert torch.allclose(logits[9:21], alone, atol=1e-5)


def layout_of(lengths):
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return PackedLayout.of(offsets, row_length=sum(lengths), device=torch.device("cpu"))


def attend(query, key, value, lengths, *, window=None, **kwargs):
    mask = None if window is None else torch.full((1, 1, 1, 1), window)
    output, _ = packed_attention(nn.Module(), query, key, value, mask, packed_layout=layout_of(lengths), **kwargs)
    return output


def reference(query, key, value, lengths, *, window=10**6, scaling=None):
    """Softmax over an explicit mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(query.shape[2])
    distance = position[:, None] - position[None]
    seen = (sample[:, None] == sample[None]) & (distance >= 0) & (distance < window)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(("window", "scaling"), [(None, None), (3, None), (None, 0.7), (1, 0.3)])
def test_attention_matches_an_explicit_mask_forward_and_backward(window, scaling):
    torch.manual_seed(1)
    lengths = (4, 1, 7)
    inputs = [torch.randn(1, heads, 12, 8, requires_grad=True) for heads in (6, 2, 2)]
    ours = attend(*inputs, lengths, window=window, scaling=scaling)
    expected = reference(*inputs, lengths, window=window or 10**6, scaling=scaling)
    assert torch.allclose(ours, expected, atol=1e-5)
    upstream = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_sixteen_bit_inputs_give_sixteen_bit_outputs_of_float32_accuracy():
    inputs = [torch.randn(1, 2, 12, 8).bfloat16() for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend(*inputs, (5, 7))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, reference(*(x.float() for x in inputs), (5, 7)).bfloat16())


def test_dropout_is_applied():
    inputs = [torch.ones(1, 2, 12, 8) for _ in range(3)]
    assert not torch.allclose(attend(*inputs, (5, 7), dropout=0.5), torch.ones(1, 12, 2, 8))


@pytest.mark.parametrize("offsets", [[0, 5], [1, 10], [0, 4, 4, 10], [0], [0, 12]])
def test_offsets_that_do_not_cover_the_row_are_refused(offsets):
    with pytest.raises(ShapeError, match="must rise from 0 to the row's 10 tokens"):
        PackedLayout.of(torch.tensor(offsets), row_length=10, device=torch.device("cpu"))


def test_a_model_that_does_not_pass_the_borders_on_is_refused():
    model = decoder("llama")
    ids, positions, _ = pack(SAMPLES)
    with pytest.raises(ConfigError, match="not told where packed samples begin"), packed_pass(implementation=PACKED):
        model(input_ids=ids, position_ids=positions, use_cache=False)


def test_a_model_without_attention_is_refused():
    with pytest.raises(ConfigError, match="no attention layers"), packed_pass(implementation=PACKED):
        F.relu(torch.zeros(1))


def test_soft_capped_scores_are_refused():
    inputs = [torch.ones(1, 2, 12, 8) for _ in range(3)]
    with pytest.raises(ConfigError, match="soft-capped"):
        attend(*inputs, (12,), softcap=50.0)


def test_a_new_layout_does_not_compile_again():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    layer = nn.Linear(8, 8)

    def block(x, layout):
        heads = layer(x).view(1, 12, 2, 4).transpose(1, 2)
        output, _ = packed_attention(layer, heads, heads, heads, None, packed_layout=layout)
        return output.flatten(2) + x

    compiled = torch.compile(block, backend=counter)
    x = torch.randn(1, 12, 8)
    num_frames = []
    for lengths in [(12,), (5, 7), (1, 2, 9), (3, 3, 3, 3), (8, 4)]:
        layout = layout_of(lengths)
        assert torch.allclose(compiled(x, layout), block(x, layout), atol=1e-6)
        num_frames.append(counter.frame_count)
    assert num_frames[0] > 0
    assert num_frames[-1] == num_frames[0]
    torch._dynamo.reset()


def test_the_variable_length_kernel_is_asked_for_the_same_attention(monkeypatch):
    """The kernel itself needs a GPU; here an explicit mask stands in for it, by its documented contract."""
    lengths, seen = (4, 1, 7), []

    def kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        seen.append((query.shape, key.shape, cu_q.dtype, cu_q.tolist(), max_q, max_k, enable_gqa))
        assert cu_k is cu_q
        left, right = window_size
        assert right == 0
        heads = [x.transpose(0, 1)[None] for x in (query, key, value)]
        return reference(*heads, lengths, window=10**6 if left < 0 else left + 1, scaling=scale)[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    inputs = [torch.randn(1, heads, 12, 8) for heads in (6, 2, 2)]
    for window, scaling in ((None, None), (3, 0.7)):
        output = attention._varlen(*inputs, layout_of(lengths), window, scaling)
        assert torch.allclose(output, attend(*inputs, lengths, window=window, scaling=scaling), atol=1e-5)
    assert seen[0] == ((12, 6, 8), (12, 2, 8), torch.int32, [0, 4, 5, 12], 7, 7, True)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
def test_the_variable_length_kernel_matches_an_explicit_mask(window):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    lengths = (40, 1, 70)
    inputs = [torch.randn(1, heads, 111, 64, device="cuda", dtype=torch.bfloat16) for heads in (6, 2, 2)]
    offsets = torch.tensor([0, 40, 41, 111])
    layout = PackedLayout.of(offsets, row_length=111, device=torch.device("cuda"))
    mask = None if window is None else torch.full((1, 1, 1, 1), window)
    output, _ = packed_attention(nn.Module(), *inputs, mask, packed_layout=layout)
    expected = reference(*(x.float().cpu() for x in inputs), lengths, window=window or 10**6)
    assert torch.allclose(output.float().cpu(), expected, atol=3e-2)
