from __future__ import annotations

import pickle
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from llava_scale.compressors import CompressedTokens, Context, CustomCompressor, token_count
from llava_scale.compressors.custom import count_of, find_compressor
from llava_scale.config.compressor import CustomConfig
from llava_scale.errors import ConfigError, ShapeError

GRID = (1, 2, 3)


@dataclass(frozen=True)
class First:
    """Keeps the first tokens; ``says`` may differ from what it does."""

    keep: int = 2
    says: int = 0

    def num_tokens(self, grid, step):
        return self.says or self.keep

    def __call__(self, x, grid, context=None):
        places = torch.arange(self.keep).expand(len(x), -1)
        return CompressedTokens(x[:, : self.keep], places, torch.ones(places.shape))


class Wide(nn.Module):
    needs_signals = True

    def __init__(self, in_width, *, width, instruction_width=0):
        super().__init__()
        self.layer, self.width = nn.Linear(in_width, width), width
        self.needs_instruction = instruction_width > 0

    @staticmethod
    def token_count(*, width):
        return First(keep=6)

    def out_width(self, in_width):
        return self.width

    def forward(self, x, grid, context):
        places = torch.arange(x.shape[1]).expand(len(x), -1)
        return CompressedTokens(self.layer(x), places, torch.ones(places.shape))


class Bare:
    num_tokens = None


class Uncounted(nn.Module):
    pass


class Plain(First):
    def __call__(self, x, grid, context=None):
        return x


@pytest.fixture(autouse=True)
def module(monkeypatch):
    made = types.ModuleType("mine_for_tests")
    for item in (First, Wide, Bare, Uncounted, Plain):
        setattr(made, item.__name__, item)
    made.function = lambda: None
    monkeypatch.setitem(sys.modules, "mine_for_tests", made)


def config(name, **fields):
    return CustomConfig(type="custom", import_path=f"mine_for_tests:{name}", **fields)


def test_a_class_without_weights_compresses_and_counts():
    made = CustomCompressor(config("First", arguments={"keep": 4}), in_width=5)
    out = made(torch.randn(3, 6, 5), GRID)
    assert out.tokens.shape == (3, 4, 5)
    assert (made.num_tokens(GRID, None), made.out_width(5)) == (4, 5)
    assert (made.needs_instruction, made.needs_signals, list(made.parameters())) == (False, False, [])


def test_a_module_gets_its_width_and_counts_without_weights():
    section = config("Wide", arguments={"width": 8})
    made = CustomCompressor(section, in_width=5)
    assert made.needs_signals
    assert made(torch.randn(2, 6, 5), GRID).tokens.shape == (2, 6, 8)
    assert [name for name, _ in made.named_parameters()] == ["inner.layer.weight", "inner.layer.bias"]
    assert token_count(section, num_blocks=0).num_tokens(GRID, 3) == 6


def test_a_count_travels_as_name_and_arguments():
    count = count_of(config("First", arguments={"keep": 3}))
    again = pickle.loads(pickle.dumps(count))
    assert again == count
    assert again.num_tokens(GRID, None) == 3
    assert "0x" not in repr(count)


def test_a_module_that_reads_questions_needs_a_reader_and_no_other_does():
    reading = config("Wide", arguments={"width": 8}, instruction_tower="text")
    assert CustomCompressor(reading, in_width=5, instruction_width=4).needs_instruction
    with pytest.raises(ConfigError, match="reads no questions: leave out instruction_tower"):
        CustomCompressor(config("First", instruction_tower="text"), in_width=5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("None", "cannot be imported"),
        ("function", "must be a class"),
        ("Bare", r"must have num_tokens\(grid, step\)"),
        ("Uncounted", r"must have token_count\(\*\*arguments\)"),
    ],
)
def test_what_is_no_compressor_is_never_called(name, message):
    with pytest.raises(ConfigError, match=message):
        CustomCompressor(config(name), in_width=5)
    with pytest.raises(ConfigError, match="on PYTHONPATH"):
        find_compressor("no.such.module:Class")
    with pytest.raises(ConfigError, match=r"package\.module:Class"):
        CustomConfig(type="custom", import_path="only.a.module")


def test_wrong_arguments_are_named():
    with pytest.raises(ConfigError, match=r"refuses the arguments .*kept"):
        CustomCompressor(config("First", arguments={"kept": 4}), in_width=5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("First", {"keep": 2, "says": 3}, r"returned tokens \(1, 2, 5\) .* promise \(1, 3, 5\)"),
        ("First", {"keep": 2, "says": -1}, "announces -1 tokens"),
        ("Plain", {}, "must return CompressedTokens, got Tensor"),
    ],
)
def test_a_broken_promise_is_named(name, arguments, message):
    with pytest.raises(ShapeError, match=message):
        CustomCompressor(config(name, arguments=arguments), in_width=5)(torch.randn(1, 6, 5), GRID, Context())
