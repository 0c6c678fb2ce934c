"""The optimizer and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from llava_scale.training.muon import MuonAdamW, split_groups

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from llava_scale.config import TrainConfig
    from llava_scale.config.train import LearningRateSchedule
    from llava_scale.training.recipe import Recipe


def lr_factor(
    step: int, *, total_steps: int, warmup_ratio: float, min_lr_ratio: float, schedule: LearningRateSchedule = "cosine"
) -> float:
    """Share of the peak learning rate at optimizer step ``step`` (from 0).

    Linear to 1 over the first ``ceil(warmup_ratio * total_steps)`` steps (the first step is already above 0), then
    half a cosine, or a line, towards ``min_lr_ratio``, which it would reach at ``total_steps``.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step >= total_steps:
        return min_lr_ratio
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr_ratio + (1 - min_lr_ratio) * left


def parameter_groups(model: nn.Module, recipe: Recipe, weight_decay: float) -> list[dict[str, Any]]:
    """Group the trained parameters by peak learning rate and decay; biases, norms and other vectors never decay."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if name not in recipe.learning_rates:
            continue
        rate = recipe.learning_rates[name]
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault(
            (rate, decay),
            {"params": [], "names": [], "lr": rate, "peak_lr": rate, "weight_decay": decay},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(model: nn.Module, recipe: Recipe, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) over the trained parameters, in one fused kernel per group.

    The fused form exists on CPU and CUDA and can leave a step out on the device itself (see ``guard.py``). With
    ``optimizer: muon``, Muon takes over the matrices between hidden features.
    """
    kind: type[torch.optim.AdamW] = torch.optim.AdamW
    groups = parameter_groups(model, recipe, config.weight_decay)
    if config.optimizer == "muon":
        kind, groups = MuonAdamW, split_groups(groups)
    return kind(groups, betas=config.adam_betas, eps=config.adam_eps, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to ``factor`` times its peak; return the highest rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return max(float(group["lr"]) for group in optimizer.param_groups)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients so that their global norm is at most ``max_norm`` (0: leave them); return the norm before.

    The norm stays on its device: nothing waits for it here.
    """
    owners = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([owner.grad for owner in owners if owner.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(owners, max_norm, norm)
    return norm


def step_where(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Update the parameters where ``finite`` (a boolean scalar on their device) is true, else change nothing.

    The fused kernel reads the flag on the device, as it does under a gradient scaler; the loop does not wait for it.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    place = optimizer.param_groups[0]["params"][0].device  # the host, for offloaded shards
    optimizer.found_inf = (~finite).float().to(place)  # type: ignore[attr-defined]
    optimizer.step()
