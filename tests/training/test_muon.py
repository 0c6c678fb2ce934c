from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llava_scale.config import TrainConfig, load_config
from llava_scale.errors import ConfigError
from llava_scale.training.muon import MuonAdamW, orthogonalize, takes_muon
from llava_scale.training.optim import build_optimizer, step_where
from llava_scale.training.recipe import Recipe


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(7, 6)
        self.up, self.down, self.twin = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 12, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        return self.down(torch.tanh(self.up(x)) + self.twin(x)).square().mean()


def optimizer_of(model: nn.Module, rate: float = 1e-2) -> MuonAdamW:
    recipe = Recipe(learning_rates=dict.fromkeys(dict(model.named_parameters()), rate), modules=())
    optimizer = build_optimizer(model, recipe, TrainConfig(optimizer="muon", weight_decay=0.1))
    assert isinstance(optimizer, MuonAdamW)
    return optimizer


@pytest.mark.parametrize("shape", [(5, 8, 8), (2, 16, 4), (1, 4, 16)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    torch.manual_seed(1)
    matrices = torch.randn(shape)
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.45
    assert values.max() < 1.55
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inside = left.mT @ result @ right.mT
    assert (inside - torch.diag_embed(torch.diagonal(inside, dim1=-2, dim2=-1))).abs().max() < 1e-4


def test_only_matrices_between_hidden_features_are_taken():
    model = Model()
    taken = {name for name, parameter in model.named_parameters() if takes_muon(name, parameter)}
    assert taken == {"up.weight", "down.weight", "twin.weight"}


def test_a_step_equals_momentum_orthogonalised_and_scaled_for_each_matrix_alone():
    model = Model()
    optimizer = optimizer_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    momentum = {name: torch.zeros_like(value) for name, value in before.items()}
    for _ in range(3):
        model(torch.arange(7)).backward()
        gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        for name in ("up.weight", "down.weight", "twin.weight"):
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradients[name]
            looked_ahead = 0.05 * gradients[name] + 0.95 * momentum[name]
            update = orthogonalize(looked_ahead[None])[0] * 0.2 * max(looked_ahead.shape) ** 0.5
            before[name] = before[name] * (1 - 1e-2 * 0.1) - 1e-2 * update
    for name in momentum.keys() & {"up.weight", "down.weight", "twin.weight"}:
        torch.testing.assert_close(model.state_dict()[name], before[name], atol=1e-6, rtol=1e-4)


def test_a_step_that_is_not_finite_changes_nothing():
    model = Model()
    optimizer = optimizer_of(model)
    model(torch.arange(7)).backward()
    step_where(optimizer, torch.tensor(True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    momentum = {key: value["exp_avg"].clone() for key, value in optimizer.state.items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    step_where(optimizer, torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(optimizer.state[key]["exp_avg"], value) for key, value in momentum.items())


def test_its_state_is_loaded_again():
    model, other = Model(), Model()
    first, second = optimizer_of(model), optimizer_of(other)
    model(torch.arange(7)).backward()
    first.step()
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for one, optimizer in ((model, first), (other, second)):
        one.zero_grad()
        one(torch.arange(7)).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_it_learns():
    model = Model()
    optimizer = optimizer_of(model)
    losses = []
    for _ in range(20):
        loss = model(torch.arange(7))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_sharded_matrices_are_refused():
    with pytest.raises(ConfigError, match="muon needs whole matrices"):
        load_config(None, ["model.preset=tiny", "train.optimizer=muon", "train.parallel.strategy=fsdp2"])
