"""ToMe: tokens merge inside the blocks of the vision tower, between attention and feed-forward network.

Token Merging (arXiv:2210.09461 §3): every other token looks for the most similar of the rest by its attention keys, the
closest pairs merge, and merged tokens weigh more in attention (proportional attention). Ours: tokens keep raster order,
and the numbers removed from each block follow from the share removed in the end.

Legend: ``B`` pictures, ``N`` tokens of a block (``P`` of them before the patches), ``K`` width of
the keys, ``D`` width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_scale.compressors.base import CompressedTokens
from llava_scale.compressors.blocks import attention_of, find_blocks, num_heads_of, parts_of
from llava_scale.compressors.merging import MergePlan, apply_merge, plan_merge
from llava_scale.compressors.schedule import RatioSchedule
from llava_scale.types import Grid


def block_removals(num_blocks: int, removed: float | Sequence[int], *, inflect: float = 0.0) -> list[int]:
    """Tokens that each block removes.

    Args:
        num_blocks: Blocks of the tower.
        removed: Mean number in each block; or the numbers of the first blocks, the others removing none.
        inflect: From -1 (falling linearly to 0) over 0 (the same in each block) to 1 (rising linearly from 0).
    """
    if isinstance(removed, Sequence):
        return [*removed, *[0] * (num_blocks - len(removed))]
    first = int(removed * (1.0 - inflect))
    rise = (2 * removed - 2 * first) / max(num_blocks - 1, 1)
    return [int(first + rise * number) for number in range(num_blocks)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TomeCount:
    """How many tokens each block removes.

    Attributes:
        schedule: Share that is removed after the last block, at each step.
        num_blocks: Blocks of the tower.
        inflect: Spread over the blocks, as in ``block_removals``.
    """

    schedule: RatioSchedule
    num_blocks: int
    inflect: float = 0.0

    def removals(self, num_patches: int, step: int | None) -> list[int]:
        """Tokens removed in each block; as a block can remove half of them at most, the rest falls to later blocks."""
        wanted = num_patches - self.schedule.num_kept(num_patches, step)
        planned = block_removals(self.num_blocks, wanted / self.num_blocks, inflect=self.inflect)
        removals: list[int] = []
        overdue = wanted - sum(planned)
        for number, removed in enumerate(planned):
            share = math.ceil(overdue / (self.num_blocks - number))
            possible = min(max(removed + share, 0), (num_patches - sum(removals)) // 2)
            overdue -= possible - removed
            removals.append(possible)
        return removals

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Tokens of one medium at ``step``; frames merge each on their own."""
        patches = grid[1] * grid[2]
        return grid[0] * (patches - sum(self.removals(patches, step)))


def match_alternate(metric_BNK: Tensor, num_removed: int, num_prefix: int) -> MergePlan:
    """Merge the ``num_removed`` even tokens that have the most similar odd ones, ToMe's bipartite soft matching.

    Args:
        metric_BNK: What is compared, by the cosine of the angle.
        num_removed: At most half of the tokens behind the prefix.
        num_prefix: P, tokens that never merge.
    """
    num_tokens = metric_BNK.shape[1]
    unit = F.normalize(metric_BNK.detach(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, :, : num_prefix // 2] = -torch.inf
    best, slot = scores.max(dim=-1)
    best[:, : (num_prefix + 1) // 2] = -torch.inf
    similarity = best.new_full(metric_BNK.shape[:2], -torch.inf)
    similarity[:, ::2] = best
    target = torch.zeros_like(similarity, dtype=torch.int64)
    target[:, ::2] = 2 * slot + 1
    return plan_merge(similarity, target, num_tokens - num_removed)


class TomeInBlocks:
    """Makes the blocks of a vision tower merge tokens; the blocks keep their parameters and names.

    Outside of ``merging`` the tower behaves as before.

    Args:
        tower: Whose blocks are changed.
        num_prefix: P, tokens before the patches.

    Raises:
        ConfigError: the tower's blocks are of no known family.
    """

    def __init__(self, tower: nn.Module, num_prefix: int) -> None:
        blocks = find_blocks(tower)
        self.num_blocks = len(blocks)
        self._num_prefix = num_prefix
        self._removals: list[int] = []
        self._keys: Tensor | None = None
        self._merged: CompressedTokens | None = None
        for number, block in enumerate(blocks):
            merging: Any = block
            merging.__class__ = _merging_class(type(block))
            merging.tome, merging.tome_number = self, number
            attention_of(block).k_proj.register_forward_hook(self._take_keys)

    @contextmanager
    def merging(self, removals: Sequence[int]) -> Iterator[None]:
        """Context of one pass of the tower, in which block i removes ``removals[i]`` tokens."""
        self._removals, self._merged = list(removals), None
        try:
            yield
        finally:
            self._removals, self._keys = [], None

    def result(self, tokens_BMD: Tensor) -> CompressedTokens:
        """What became of the patches in the pass that was made last, around the tower's features of them."""
        if self._merged is None:
            positions = torch.arange(tokens_BMD.shape[1], device=tokens_BMD.device).expand(tokens_BMD.shape[:2])
            return CompressedTokens(tokens_BMD, positions, torch.ones_like(positions).float(), positions)
        first = self._num_prefix
        _, positions, sizes, group = self._merged
        assert group is not None
        return CompressedTokens(tokens_BMD, positions[:, first:] - first, sizes[:, first:], group[:, first:] - first)

    def bias(self, like: Tensor) -> Tensor | None:
        """Logarithm of the sizes, ``(B, 1, 1, N)``, that attention adds to its scores; None while all are 1."""
        return None if self._merged is None else self._merged.sizes.log().to(like.dtype)[:, None, None]

    def merge(self, x_BND: Tensor, number: int, num_heads: int) -> Tensor:
        """Tokens after block ``number``'s attention, merged as its keys say."""
        if not self._removals or not self._removals[number]:
            return x_BND
        assert self._keys is not None
        metric = self._keys.view(*self._keys.shape[:2], num_heads, -1).mean(dim=2)
        plan = match_alternate(metric, self._removals[number], self._num_prefix)
        before = self._merged
        merged = apply_merge(x_BND, plan, None if before is None else before.sizes)
        if before is not None and before.group is not None:
            positions = before.positions.gather(1, merged.positions)
            merged = merged._replace(positions=positions, group=plan.group.gather(1, before.group))
        self._merged = merged._replace(tokens=merged.tokens.new_empty(0))
        return merged.tokens

    def _take_keys(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._keys = output.detach() if self._removals else None


class _MergingBlock:
    """Forward pass of a block that merges; mixed into the class of the family's block."""

    tome: TomeInBlocks
    tome_number: int

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Attention, merging, feed-forward network; ``attention_mask`` is None for pictures."""
        block: Any = self
        parts = parts_of(block)
        assert parts is not None
        attention = getattr(block, parts.attention)
        bias = self.tome.bias(hidden_states) if attention_mask is None else attention_mask
        output, _ = attention(getattr(block, parts.first_norm)(hidden_states), attention_mask=bias, **kwargs)
        for name in parts.after_attention:
            output = getattr(block, name)(output)
        hidden_states = self.tome.merge(hidden_states + output, self.tome_number, num_heads_of(attention))
        output = block.mlp(getattr(block, parts.second_norm)(hidden_states))
        for name in parts.after_mlp:
            output = getattr(block, name)(output)
        mixed: Tensor = hidden_states + output
        return mixed


_MERGING_CLASSES: dict[type, type] = {}


def _merging_class(family: type) -> type:
    """``family`` with the forward pass of ``_MergingBlock``; one class for each family."""
    if issubclass(family, _MergingBlock):
        return family
    if family not in _MERGING_CLASSES:
        _MERGING_CLASSES[family] = type(f"Merging{family.__name__}", (_MergingBlock, family), {})
    return _MERGING_CLASSES[family]
