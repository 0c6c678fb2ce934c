"""Recipes: which parameters a stage trains, and at which learning rate."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_scale.errors import ConfigError
from llava_scale.training.lora import is_adapter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from llava_scale.config import TrainConfig

STAGES: dict[str, tuple[str, ...]] = {
    "align": (r"(?!language_model\.|\w*tower\.)",),
    "instruct": (r"(?!\w*tower\.)",),
    "align_audio": (r"audio_(projector|compressor)\.",),
    "instruct_av": (r"(?!vision_tower\.|instruction_tower\.)",),
}
"""Regular expressions (matched at the start of a parameter's name) that each stage trains at the peak rate: what lies
between towers and language model, and the language model itself; the same for sounds alone; all but the towers that see
and read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSummary:
    """One line of the opening table: a top-level module and what is trained of it.

    Attributes:
        name: First part of its parameters' names.
        num_parameters: All its parameters.
        num_trainable: Those that are trained.
        learning_rates: Distinct peak rates among them, descending.
    """

    name: str
    num_parameters: int
    num_trainable: int
    learning_rates: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is trained.

    Attributes:
        learning_rates: Parameter name -> peak learning rate; frozen parameters are left out.
        modules: Summary of every top-level module, in the model's order.
    """

    learning_rates: dict[str, float]
    modules: tuple[ModuleSummary, ...]

    @property
    def num_trainable(self) -> int:
        """Number of trained values."""
        return sum(module.num_trainable for module in self.modules)

    @property
    def num_parameters(self) -> int:
        """Number of values of the whole model."""
        return sum(module.num_parameters for module in self.modules)


def plan_recipe(model: nn.Module, config: TrainConfig) -> Recipe:
    """Return the learning rate of every trained parameter of ``model``.

    The stage's rules come first, then ``train.trainable`` in its order; the last rule that matches the start of a
    name wins, and a rate of 0 freezes. With adapters the stage trains these instead of the language model.

    Raises:
        ConfigError: a rule is no regular expression, a rule matches nothing, or nothing is left to train.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    rates = dict.fromkeys(sizes, 0.0)
    for pattern in STAGES[config.stage]:
        for name in _matching(pattern, sizes):
            rates[name] = config.learning_rate
    if config.lora.rank:
        rates.update({name: 0.0 for name in sizes if name.startswith("language_model.") or ".base_layer." in name})
        rates.update({name: config.learning_rate for name in sizes if is_adapter(name)})
    for pattern, rate in config.trainable.items():
        if rate < 0:
            raise ConfigError(f"train.trainable: the learning rate of {pattern!r} is {rate}; it must not be negative")
        matched = _matching(pattern, sizes)
        if not matched:
            known = ", ".join(f"{name}." for name in _top_level(sizes))
            raise ConfigError(f"train.trainable: {pattern!r} matches no parameter; names begin with {known}")
        rates.update(dict.fromkeys(matched, rate))
    trained = {name: rate for name, rate in rates.items() if rate > 0}
    if not trained:
        raise ConfigError(
            f"nothing is trained: stage {config.stage!r} with train.learning_rate={config.learning_rate} and "
            f"train.trainable={config.trainable} leaves every parameter frozen; give a module a learning rate above 0"
        )
    return Recipe(learning_rates=trained, modules=_summaries(sizes, trained))


def apply_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Freeze every parameter outside ``recipe`` and put the model into its training modes."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in recipe.learning_rates)
    set_training_modes(model)


def set_training_modes(model: nn.Module) -> None:
    """Put ``model`` into training mode, and every module without a trained parameter into evaluation mode.

    So a frozen tower has no dropout and its batch statistics stay as they were. Layers that recompute their
    activations look at their own mode to do so: they alone are set to training, their parts are not.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    try:
        rule = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"train.trainable: {pattern!r} is not a regular expression: {error}") from None
    return [name for name in names if rule.match(name)]


def _top_level(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def _summaries(sizes: dict[str, int], trained: dict[str, float]) -> tuple[ModuleSummary, ...]:
    summaries = []
    for module in _top_level(sizes):
        names = [name for name in sizes if name.partition(".")[0] == module]
        rates = {trained[name] for name in names if name in trained}
        summaries.append(
            ModuleSummary(
                name=module,
                num_parameters=sum(sizes[name] for name in names),
                num_trainable=sum(sizes[name] for name in names if name in trained),
                learning_rates=tuple(sorted(rates, reverse=True)),
            )
        )
    return tuple(summaries)
