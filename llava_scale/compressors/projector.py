"""Maps from the tower's width into the language model's, one token to one token.

Legend: ``B`` pictures, ``N`` tokens, ``D`` width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llava_scale.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Projector(nn.Module):
    """Layers applied to every token alone; the number and the order of tokens stay.

    Layers are numbered as in ``nn.Sequential``, so parameters are called ``0.weight``, ``2.weight`` as in LLaVA's
    ``mm_projector``; an input norm is called ``norm`` and does not shift the numbers.

    Args:
        layers: Applied in order.
        input_norm: Width of a LayerNorm before the first layer; 0 for none.
    """

    norm: nn.LayerNorm | None

    def __init__(self, layers: Sequence[nn.Module], *, input_norm: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(input_norm) if input_norm else None
        self.num_layers = len(layers)
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    @property
    def layers(self) -> list[nn.Module]:
        """The numbered layers, in order."""
        return [self.get_submodule(str(number)) for number in range(self.num_layers)]

    def forward(self, x_BND: Tensor) -> Tensor:
        """Project ``(B, N, tower width)`` to ``(B, N, language model width)``."""
        if self.norm is not None:
            x_BND = self.norm(x_BND)
        for layer in self.layers:
            x_BND = layer(x_BND)
        return x_BND

    def reset_parameters(self) -> None:
        """Draw all parameters afresh (torch's defaults, as in LLaVA) from the global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply all future outputs by ``factor`` through the last layer's parameters.

        Raises:
            ConfigError: there is no layer to scale.
        """
        last = self.layers[-1] if self.num_layers else None
        if not isinstance(last, nn.Linear):
            raise ConfigError(
                "model.projector.match_embedding_scale needs a projector with a linear layer; "
                "set model.projector.type to linear or mlp2x_gelu, or switch it off"
            )
        for parameter in last.parameters():
            parameter.mul_(factor)


def linear_layers(in_width: int, out_width: int) -> list[nn.Module]:
    """One linear map, as in the first LLaVA."""
    return [nn.Linear(in_width, out_width)]


def mlp_layers(in_width: int, out_width: int, *, depth: int) -> list[nn.Module]:
    """``depth`` linear layers with GELU between them, all of the language model's width (LLaVA-1.5 has two)."""
    layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out_width, out_width)]
    return layers


def identity_layers(in_width: int, out_width: int) -> list[nn.Module]:
    """Nothing, for towers whose features already have the language model's width.

    Raises:
        ConfigError: the widths differ.
    """
    if in_width != out_width:
        raise ConfigError(
            f"model.projector.type: identity needs equal widths, but the vision tower has {in_width} and the "
            f"language model {out_width}; use linear or mlp2x_gelu"
        )
    return []
