"""The blocks of a vision transformer, whatever its family calls their parts, and what their attention tells.

Legend: ``B`` pictures, ``H`` heads, ``N`` tokens (``P`` of them before the patches), ``K`` width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_scale.compressors.base import TowerSignals
from llava_scale.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BlockParts:
    """Names of the parts of a pre-norm block, in the order in which they are applied.

    Attributes:
        first_norm: Before the attention.
        attention: Has ``q_proj`` and ``k_proj``.
        after_attention: Applied to its output: scales, dropout.
        second_norm: Before the feed-forward network.
        after_mlp: As ``after_attention``.
    """

    first_norm: str
    attention: str
    after_attention: tuple[str, ...]
    second_norm: str
    after_mlp: tuple[str, ...]


FAMILIES = {
    "CLIP, SigLIP": BlockParts("layer_norm1", "self_attn", (), "layer_norm2", ()),
    "ViT, DeiT": BlockParts("layernorm_before", "attention", ("dropout",), "layernorm_after", ("dropout",)),
    "DINOv2": BlockParts("norm1", "attention", ("layer_scale1", "drop_path"), "norm2", ("layer_scale2", "drop_path")),
}
"""Blocks of transformers' vision models by family; their feed-forward network is ``mlp`` everywhere."""


def parts_of(block: nn.Module) -> BlockParts | None:
    """Names of the parts of ``block``; None for a block of no known family."""
    for parts in FAMILIES.values():
        needed = (parts.first_norm, parts.second_norm, "mlp", *parts.after_attention, *parts.after_mlp)
        attention = getattr(block, parts.attention, None)
        has_attention = hasattr(attention, "q_proj") and hasattr(attention, "k_proj")
        if has_attention and all(isinstance(getattr(block, name, None), nn.Module) for name in needed):
            return parts
    return None


def find_blocks(tower: nn.Module) -> list[nn.Module]:
    """Blocks of the vision transformer in ``tower``, first to last.

    Raises:
        ConfigError: there are none of a known family.
    """
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(parts_of(block) for block in module):
            return list(module)
    raise ConfigError(
        f"this compressor looks into the blocks of the vision tower, and knows those of {'; '.join(FAMILIES)} only; "
        "choose another model.compressor or model.vision_tower"
    )


def attention_of(block: nn.Module) -> Any:
    """The attention of a block of a known family."""
    parts = parts_of(block)
    assert parts is not None
    return getattr(block, parts.attention)


def num_heads_of(attention: Any) -> int:
    """Heads of an attention, by whichever name it has them."""
    return int(getattr(attention, "num_heads", None) or attention.num_attention_heads)


class SignalTap:
    """Listens to the last attention of a vision tower.

    Args:
        tower: Whose last block is listened to.
        num_prefix: P, tokens before the patches; the first of them is the class token.

    Raises:
        ConfigError: the tower's blocks are of no known family.
    """

    def __init__(self, tower: nn.Module, num_prefix: int) -> None:
        attention = attention_of(find_blocks(tower)[-1])
        self._num_heads, self._num_prefix = num_heads_of(attention), num_prefix
        self._queries: Tensor | None = None
        self._keys: Tensor | None = None
        attention.q_proj.register_forward_hook(self._take_queries)
        attention.k_proj.register_forward_hook(self._take_keys)

    @torch.no_grad()
    def signals(self) -> TowerSignals:
        """Of the pass that was made last; they are forgotten thereafter."""
        assert self._queries is not None, "the tower has not run"
        assert self._keys is not None, "the tower has not run"
        queries, keys = self._heads(self._queries), self._heads(self._keys)
        self._queries = self._keys = None
        asking = queries[:, :, :1] if self._num_prefix else queries
        weights = (asking @ keys.transpose(2, 3) * keys.shape[-1] ** -0.5).softmax(dim=-1, dtype=torch.float32)
        saliency = weights.mean(dim=(1, 2))[:, self._num_prefix :]
        return TowerSignals(keys=keys.mean(dim=1)[:, self._num_prefix :], saliency=saliency)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self._num_heads, -1).transpose(1, 2)

    def _take_queries(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._queries = output.detach()

    def _take_keys(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._keys = output.detach()
