from __future__ import annotations

import pytest
import torch

from llava_scale.config.load import parse_config
from llava_scale.model import build_model, row_inputs
from llava_scale.training.estimate import (
    Hardware,
    SampleShape,
    _HeldBytes,
    estimate,
    held_bytes,
    model_without_memory,
    rank_memory,
)
from llava_scale.training.recipe import apply_recipe, plan_recipe
from llava_scale.types import PackedRow

SAMPLE = SampleShape(pictures=1, text_tokens=50, answer_share=0.5)


def config_of(row_length=256, **train):
    tree = {"model": {"preset": "tiny"}, "data": {"packing": {"row_length": row_length}}, "train": train}
    return parse_config(tree, origin="test")


def prepared(config):
    model = model_without_memory(config.model)
    apply_recipe(model, plan_recipe(model, config.train))
    return model


def text_row(length):
    ids = torch.arange(length) % 200
    return PackedRow(
        input_ids=ids,
        labels=ids.clone(),
        position_ids=torch.arange(length),
        cu_seq_lens=torch.tensor([0, length], dtype=torch.int32),
    )


def test_the_model_without_memory_has_the_parameters_of_the_real_one():
    config = config_of()
    real, _ = build_model(config.model, chat_template="native", seed=0)
    shapes = {name: tuple(value.shape) for name, value in real.named_parameters()}
    model = model_without_memory(config.model)
    assert {name: tuple(value.shape) for name, value in model.named_parameters()} == shapes
    assert {value.device.type for value in model.parameters()} == {"meta"}


@pytest.mark.parametrize("half", [False, True])
def test_held_activations_are_those_of_a_real_pass(half):
    config = config_of(row_length=512)
    real, _ = build_model(config.model, chat_template="native", seed=0)
    real.train().vision_tower.requires_grad_(False)
    counter = _HeldBytes(real)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half), counter:
        real(**{**row_inputs(text_row(512)), "labels": torch.full((1, 512), -100)})
    activations, _, _ = held_bytes(prepared(config), config, row_tokens=512, supervised=10, half=half)
    assert activations == pytest.approx(counter.total, rel=0.15)


def test_recomputing_holds_less():
    plain, saving = (
        held_bytes(prepared(config), config, row_tokens=512, supervised=10, half=True)[0]
        for config in (config_of(), config_of(gradient_checkpointing=True))
    )
    assert saving < 0.6 * plain


def test_sharding_divides_what_is_trained_and_keeps_the_tower_whole():
    alone, shared = (
        rank_memory(prepared(config), config, num_ranks=4, row_tokens=64, supervised=10, half=False)
        for config in (
            config_of(rows_per_step=4),
            config_of(rows_per_step=4, parallel={"strategy": "fsdp2", "reduce_every_row": True}),
        )
    )
    model = prepared(config_of())
    tower = sum(value.numel() * 4 for value in model.vision_tower.parameters())
    assert shared.optimizer == pytest.approx(alone.optimizer / 4)
    assert shared.weights == pytest.approx((alone.weights - tower) / 4 + tower)
    assert shared.gathered > 0
    assert alone.gathered == 0


def test_muon_keeps_one_moment_of_a_matrix():
    adamw, muon = (
        rank_memory(prepared(config), config, num_ranks=1, row_tokens=64, supervised=10, half=False).optimizer
        for config in (config_of(), config_of(optimizer="muon"))
    )
    assert 0.5 * adamw < muon < adamw


def test_twice_the_devices_take_half_the_hours():
    def hours(devices):
        hardware = Hardware(num_devices=devices, peak_tflops=100, mfu=0.5)
        return estimate(config_of(rows_per_step=8), hardware=hardware, sample=SAMPLE, num_samples=10_000).hours

    assert hours(4) == pytest.approx(hours(2) / 2)
