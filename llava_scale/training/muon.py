"""Muon for weight matrices beside AdamW for everything else.

Muon (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a weight matrix by
the nearest matrix whose singular values are about 1, so that every direction of the matrix moves at the same rate.
Updates are scaled to AdamW's typical size, so one learning rate and one weight decay serve both (Liu et al., "Muon is
Scalable for LLM Training", arXiv:2502.16982, section 2.2).
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

_COEFFICIENTS = ((8.1025, -22.7788, 16.4076), (3.8808, -2.8382, 0.5324), (3.1848, -2.3881, 0.4987))
"""Odd quintics, one an iteration, each the best for what the one before leaves of [0.005, 1] (Amsel et al., "The Polar
Express", arXiv:2505.16932, sections 3 and 4); all but the last are stretched by 1.01 against rounding in bfloat16."""
_SLACK = 1.04
_MOMENTUM = 0.95
_ADAMW_RMS = 0.2


def takes_muon(name: str, parameter: nn.Parameter) -> bool:
    """Whether ``parameter`` is a matrix between hidden features: no embedding, no output head, no vector or kernel."""
    return parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "query"))


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with ``muon: True`` are updated by Muon.

    Matrices of one shape are worked on together. The state of a matrix is its momentum, under AdamW's name
    ``exp_avg``, and ``step``. Like fused AdamW it changes nothing where ``found_inf`` says so, without waiting for
    the device.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters; a closure is not supported."""
        if closure is not None:
            raise NotImplementedError("MuonAdamW takes no closure")
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[torch.Size, torch.device], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[(parameter.shape, parameter.device)].append(parameter)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for (shape, device), parameters in alike.items():
            lost = torch.zeros((), device=device) if found_inf is None else found_inf.reshape(())
            gradient = torch.stack([parameter.grad for parameter in parameters])  # type: ignore[misc]
            gradient.masked_fill_(lost.bool(), 0)
            momenta = [self._momentum_of(parameter) for parameter in parameters]
            torch._foreach_mul_(momenta, _MOMENTUM + (1 - _MOMENTUM) * lost)
            torch._foreach_add_(momenta, list(gradient.unbind()), alpha=1 - _MOMENTUM)
            update = orthogonalize(gradient.lerp_(torch.stack(momenta), _MOMENTUM)).to(gradient.dtype)
            update.mul_(-group["lr"] * _ADAMW_RMS * max(shape) ** 0.5 * (1 - lost))
            torch._foreach_mul_(list(parameters), 1 - group["lr"] * group["weight_decay"] * (1 - lost))
            torch._foreach_add_(list(parameters), list(update.unbind()))

    def _momentum_of(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        momentum: Tensor = state["exp_avg"]
        return momentum


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push the singular values of ``(K, rows, columns)`` matrices to about 1, keeping their directions.

    Values from 0.005 of the largest up become 0.48 to 1.5, smaller ones about 100 times what they were. Three
    Newton-Schulz iterations after a division by the Frobenius norm of the Gram matrix, which bounds the largest value
    much closer than that of the matrix; in bfloat16 on CUDA devices, else in float32.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT.contiguous()
    gram = x @ x.mT
    # at least the square of any singular value
    largest = gram.norm(dim=(-2, -1), keepdim=True, dtype=torch.float32).clamp_min(1e-14) * _SLACK
    x, gram = (x * largest.rsqrt()).to(x.dtype), (gram / largest).to(x.dtype)
    for number, (a, b, c) in enumerate(_COEFFICIENTS):
        if number:
            gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def split_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split each parameter group into what Muon updates and what AdamW updates."""
    split = []
    for group in groups:
        for muon in (True, False):
            pairs = [
                (parameter, name)
                for parameter, name in zip(group["params"], group["names"], strict=True)
                if takes_muon(name, parameter) == muon
            ]
            if pairs:
                parameters, names = zip(*pairs, strict=True)
                split.append({**group, "params": list(parameters), "names": list(names), "muon": muon})
    return split
