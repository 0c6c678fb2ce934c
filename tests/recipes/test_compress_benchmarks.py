"""The compression benchmarks run whole at small sizes, and measure what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]


def run(module, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    module.main()
    return capsys.readouterr().out


def test_all_runs_take_turns_backwards_every_other_round():
    from compression import Meter

    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = Meter(torch.device("cpu"), 3).interleaved(runs)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(values) for values in times.values()] == [3, 3]


def test_peak_memory_counts_what_is_freed_before_the_end():
    from compression import Meter

    def call():
        large = torch.ones(1000, 1000)
        return (large[:10].clone(),)

    peak, results = Meter(torch.device("cpu"), 1).peak_bytes(call)
    assert results == 40_000
    assert 4_040_000 <= peak < 4_500_000


def test_windows_are_timed_at_small_sizes(monkeypatch, capsys):
    import compress_window

    out = run(compress_window, monkeypatch, capsys, "--small", "--rounds", "1")
    for name in ("24 of 32 forward", "384 of 32 forward + backward", "384, whole layer, forward + backward"):
        assert f"| {name} | ours |" in out
    assert "| floor |" in out


def test_merging_is_timed_at_small_sizes(monkeypatch, capsys):
    pytest.importorskip("tomesd")
    import compress_merge

    out = run(compress_merge, monkeypatch, capsys, "--small", "--rounds", "1")
    for name in (
        "forward (8, 64, 64) float32",
        "forward clip of 16 bfloat16",
        "forward + backward (8, 64, 64) bfloat16",
    ):
        assert f"| {name} | ours" in out


@pytest.mark.slow
@pytest.mark.parametrize("shape", [["--width", "128"], ["--shape", "vicuna-7b", "--recompute"]], ids=["small", "7b"])
def test_training_steps_are_timed_beside_the_uncompressed_one(monkeypatch, capsys, shape):
    import compress_training

    if shape[-1] == "--recompute":  # a layer of the real width would take a gigabyte
        monkeypatch.setattr(
            compress_training,
            "LlamaConfig",
            lambda **sizes: compress_training.Qwen2Config(
                hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2, **sizes
            ),
        )
    few = ["--layers", "1", "--tower-layers", "2", "--samples", "1", "--rounds", "1", "--precision", "fp32"]
    out = run(compress_training, monkeypatch, capsys, *few, *shape, "--only", "merging, r 0.5")
    assert "| uncompressed | 256 |" in out
    assert "| merging, r 0.5 | 128 |" in out
