from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_scale.compressors.window_attention import (
    DENSE_UP_TO,
    groups,
    legacy_windows,
    query_windows,
    window_attention,
)
from tests.compressors import golden

ATTENTION = golden.load("seed_qformer_attention")
SWIN = golden.cases("seed_qformer_attention", "swin")


@given(m=st.integers(1, 400), n=st.integers(1, 64), w=st.integers(1, 128))
@settings(max_examples=400, deadline=None)
def test_query_windows_see_every_token_and_keep_order(m, n, w):
    windows = query_windows(num_tokens=m, num_queries=n, width=w)
    assert len(windows) == n
    assert set().union(*windows) == set(range(m))
    assert [window.start for window in windows] == sorted(window.start for window in windows)
    assert len({len(window) for window in windows}) == 1


@pytest.mark.parametrize("name", list(golden.load("seed_window_ranges")))
def test_legacy_windows_are_the_originals(name):
    m, n, w = (int(part[1:]) for part in name.split("_"))
    windows = legacy_windows(num_tokens=m, num_queries=n, width=w)
    expected = golden.load("seed_window_ranges")[name].tolist()
    assert [[window.start, window.stop] for window in windows] == expected


@pytest.mark.parametrize("case", golden.cases("seed_split_tensor"), ids=lambda case: str(case["args_n_w"].tolist()))
def test_legacy_windows_hold_what_the_original_cut_out(case):
    n, w = case["args_n_w"].tolist()
    windows = legacy_windows(num_tokens=case["x"].shape[1], num_queries=n, width=w)
    golden.assert_same(torch.stack([case["x"][:, list(window)] for window in windows], dim=1), case["out"])


@pytest.mark.parametrize("number", [0, 1])
def test_seeing_everything_is_plain_attention(number):
    arrays = golden.cases("seed_qformer_attention", "full")[number]
    windows = (range(arrays["k"].shape[1]),) * arrays["q"].shape[1]
    out = window_attention(*(arrays[name].unsqueeze(1) for name in "qkv"), windows)
    golden.assert_same(out.squeeze(1), arrays["out"])


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "grouped"])
@pytest.mark.parametrize("number", range(len(SWIN)))
def test_outputs_and_gradients_are_the_originals(number, dense, monkeypatch):
    monkeypatch.setattr("llava_scale.compressors.window_attention.DENSE_UP_TO", 10**6 if dense else 0)
    case = SWIN[number]
    inputs = [case[name].clone().requires_grad_() for name in "qkv"]
    windows = legacy_windows(num_tokens=inputs[1].shape[1], num_queries=inputs[0].shape[1], width=int(case["window"]))
    out = window_attention(*(x.unsqueeze(1) for x in inputs), windows).squeeze(1)
    golden.assert_same(out, case["out"])
    for name, grad in zip("qkv", torch.autograd.grad(out, inputs, case["grad_out"]), strict=True):
        golden.assert_same(grad, case[f"grad_{name}"])


@given(m=st.integers(1, 60), n=st.integers(1, 12), w=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_groups_and_mask_give_what_each_query_alone_would(m, n, w, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2, n, 4, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, m, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    windows = query_windows(num_tokens=m, num_queries=n, width=w)
    alone = [
        torch.nn.functional.scaled_dot_product_attention(
            q[:, :, i : i + 1], k[:, :, window.start : window.stop], v[:, :, window.start : window.stop]
        )
        for i, window in enumerate(windows)
    ]
    torch.testing.assert_close(window_attention(q, k, v, windows), torch.cat(alone, dim=2))


def test_groups_span_at_most_two_windows_and_cover_all_queries():
    windows = query_windows(num_tokens=9216, num_queries=64, width=512)
    found = groups(windows)
    assert DENSE_UP_TO * 512 < 9216, "this size would not be grouped"
    assert [query for queries, _, _ in found for query in range(64)[queries]] == list(range(64))
    assert all(tokens.stop - tokens.start <= 1024 for _, tokens, _ in found)
    assert len(found) < 20
