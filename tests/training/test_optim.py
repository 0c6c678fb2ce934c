from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llava_scale.config import TrainConfig
from llava_scale.training.optim import (
    build_optimizer,
    clip_gradients,
    lr_factor,
    parameter_groups,
    set_learning_rates,
    step_where,
)
from llava_scale.training.recipe import Recipe


def recipe_for(model: nn.Module, **rates: float) -> Recipe:
    chosen = {name: rates.get(name.partition(".")[0], 1e-3) for name, _ in model.named_parameters()}
    return Recipe(learning_rates={name: rate for name, rate in chosen.items() if rate}, modules=())


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "b": nn.Linear(4, 2)})


@given(
    total=st.integers(1, 500),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
    schedule=st.sampled_from(("cosine", "linear")),
)
def test_the_learning_rate_rises_then_falls_and_is_never_zero_inside_the_run(total, warmup, floor, schedule):
    how = {"total_steps": total, "warmup_ratio": warmup, "min_lr_ratio": floor, "schedule": schedule}
    factors = [lr_factor(step, **how) for step in range(total)]
    peak = math.ceil(warmup * total)
    assert all(0 < factor <= 1 for factor in factors)
    assert all(early < late for early, late in pairwise(factors[:peak]))
    assert all(early >= late for early, late in pairwise(factors[peak:]))
    assert all(factor >= floor - 1e-12 for factor in factors[peak:])


def test_the_learning_rate_peaks_after_warm_up_and_halves_in_the_middle_of_the_cosine():
    values = [lr_factor(step, total_steps=110, warmup_ratio=10 / 110, min_lr_ratio=0.0) for step in (0, 9, 10, 60, 110)]
    assert values == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])


def test_a_linear_schedule_falls_by_the_same_each_step():
    how = {"total_steps": 110, "warmup_ratio": 10 / 110, "min_lr_ratio": 0.2, "schedule": "linear"}
    factors = [lr_factor(step, **how) for step in range(10, 111)]
    assert factors[0] == 1.0
    assert [early - late for early, late in pairwise(factors)] == pytest.approx([0.008] * 100)


def test_biases_and_norms_never_decay(model):
    groups = parameter_groups(model, recipe_for(model, b=1e-4), weight_decay=0.1)
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert {name for name, decay in decays.items() if decay} == {"a.weight", "b.weight"}
    assert {group["peak_lr"] for group in groups} == {1e-3, 1e-4}


def test_frozen_parameters_are_in_no_group(model):
    groups = parameter_groups(model, recipe_for(model, a=0.0), weight_decay=0.0)
    assert [name for group in groups for name in group["names"]] == ["norm.weight", "norm.bias", "b.weight", "b.bias"]


def test_every_group_keeps_its_own_peak(model):
    optimizer = build_optimizer(model, recipe_for(model, b=1e-4), TrainConfig())
    assert set_learning_rates(optimizer, 0.5) == pytest.approx(5e-4)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([5e-5, 5e-4])


def test_clipping_scales_to_the_global_norm_and_returns_the_norm_before(model):
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    count = sum(parameter.numel() for parameter in parameters)
    assert float(clip_gradients(parameters, 1.0)) == pytest.approx(2 * count**0.5)
    assert float(clip_gradients(parameters, 0.0)) == pytest.approx(1.0)


def test_clipping_without_any_gradient_returns_zero(model):
    assert float(clip_gradients(model.parameters(), 1.0)) == 0.0


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing_at_all(model, steps_before):
    optimizer = build_optimizer(model, recipe_for(model), TrainConfig(weight_decay=0.1))

    def update(value: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        step_where(optimizer, torch.tensor(math.isfinite(value)))

    for _ in range(steps_before):
        update(1.0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    update(math.nan)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    after = [value for entry in optimizer.state.values() for value in entry.values()]
    assert all(torch.equal(old, new) for old, new in zip(moments, after, strict=False))
    assert all(torch.isfinite(value).all() for value in after)
    update(1.0)
    assert not torch.equal(model["a"].weight, weights["a.weight"])
