"""SwinQFormer: learned queries read the question, then each looks at its own window of the picture or clip.

Legend: ``B`` media, ``N`` tokens, ``Q`` queries, ``L`` tokens of a question, ``D`` width of the tokens, ``E`` width of
the instruction tower, ``C`` width of the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_scale.compressors.base import EVALUATION, CompressedTokens, Context, Instruction
from llava_scale.compressors.merging import check_grid
from llava_scale.compressors.normed_tokens import NormedTokens, absorbs
from llava_scale.compressors.window_attention import (
    Windows,
    legacy_windows,
    query_windows,
    window_attention,
    window_weights,
)
from llava_scale.types import Grid

QUERY_STD = 0.02
"""Standard deviation of learned queries at the start, as usual for embeddings."""

BRANCH_SCALE = 0.1
"""What attention and feed-forward add to pooled queries at the start, as a share of what a fresh layer would."""


Recorder = Callable[[Tensor], object]
"""Hears the attention weights ``(B, H, Q, N)`` of each pass, for those who want to look at them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryCount:
    """Tokens of a compressor that answers with queries.

    Attributes:
        num_queries: Queries in one set.
        scope: One set for each ``frame``, or one for the whole ``clip``.
    """

    num_queries: int
    scope: Literal["frame", "clip"] = "frame"

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Queries for one medium, whatever the step."""
        return self.num_queries * (grid[0] if self.scope == "frame" else 1)


class QueryCompressor(nn.Module):
    """What both forms share: sets of queries over frames or clips, positions and sizes of what they return.

    Args:
        width: C, width of the returned tokens.
        num_queries: Queries in one set.
        window: Tokens that each query sees.
        scope: What one set looks at.
        reads: Whether questions are read.
    """

    needs_signals = False

    def __init__(
        self, *, width: int, num_queries: int, window: int, scope: Literal["frame", "clip"], reads: bool
    ) -> None:
        super().__init__()
        self.width, self.window, self.needs_instruction = width, window, reads
        self.count = QueryCount(num_queries=num_queries, scope=scope)

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Queries for one medium, whatever the step."""
        return self.count.num_tokens(grid, step)

    def out_width(self, in_width: int) -> int:
        """Width of the queries."""
        return self.width

    def windows(self, num_tokens: int) -> Windows:
        """Tokens that each query sees, of those that one set looks at."""
        return query_windows(num_tokens=num_tokens, num_queries=self.count.num_queries, width=self.window)

    def forward(self, x_BND: Tensor, grid: Grid, context: Context = EVALUATION) -> CompressedTokens:
        """Answer with ``(B, Q, C)`` for each frame, or for the whole medium.

        Args:
            x_BND: Tokens in raster and time order.
            grid: Frames, rows and columns.
            context: The question, one for each medium.
        """
        check_grid(x_BND, grid)
        num_batch, parts = x_BND.shape[0], grid[0] if self.count.scope == "frame" else 1
        sets_BND = x_BND.reshape(num_batch * parts, -1, x_BND.shape[2])
        instruction = context.instruction if self.needs_instruction else None
        if instruction is not None:
            instruction = Instruction(*(value.repeat_interleave(parts, dim=0) for value in instruction))
        windows = self.windows(sets_BND.shape[1])
        part_grid = (grid[0] // parts, *grid[1:])
        tokens = self.answer(sets_BND, part_grid, windows, instruction).reshape(num_batch, -1, self.width)
        centers = torch.tensor([(window.start + window.stop) // 2 for window in windows], device=x_BND.device)
        starts = torch.arange(parts, device=x_BND.device).unsqueeze(1) * sets_BND.shape[1]
        positions = (starts + centers).flatten().expand(num_batch, -1)
        size = sets_BND.shape[1] / self.count.num_queries
        return CompressedTokens(tokens, positions, torch.full(positions.shape, size, device=x_BND.device))

    def answer(self, x_BND: Tensor, grid: Grid, windows: Windows, instruction: Instruction | None) -> Tensor:
        """Answers ``(B, Q, C)`` of one set of queries to each of ``x_BND``."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw all parameters afresh from the global generator."""
        raise NotImplementedError


class SwinQFormer(QueryCompressor):
    """Layers of cross-attention to the question, windowed cross-attention to the tokens, and a feed-forward network.

    Pre-norm and residual throughout. Differs from the original in many ways (see ``LegacySwinQFormer``): several heads
    and layers, a norm for each use, padding of questions is masked, every token is seen, the width is free of the
    language model's.

    Args:
        in_width: D.
        instruction_width: E; 0 does not read questions.
        width: C.
        num_queries: Queries in one set.
        num_layers: Layers.
        num_heads: Attention heads.
        window: Tokens that each query sees; more where too few queries would leave some unseen.
        scope: One set of queries for each ``frame``, or one over the whole ``clip``.
        pooled_queries: Add to each learned query the mean of its share of the tokens (as in Granite 4 Vision), so that
            even untrained queries tell what lies where.
        position: ``sincos`` adds frame, row and column to the tokens' keys; ``none`` leaves them to the tower.
    """

    def __init__(
        self,
        in_width: int,
        *,
        instruction_width: int,
        width: int,
        num_queries: int = 64,
        num_layers: int = 2,
        num_heads: int = 8,
        window: int = 512,
        scope: Literal["frame", "clip"] = "frame",
        pooled_queries: bool = True,
        position: Literal["sincos", "none"] = "sincos",
    ) -> None:
        super().__init__(width=width, num_queries=num_queries, window=window, scope=scope, reads=instruction_width > 0)
        self.position, self.head_width = position, width // num_heads
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.null_instruction = nn.Parameter(torch.empty(instruction_width)) if instruction_width else None
        self.norm_tokens = nn.LayerNorm(in_width)
        self.norm_instruction = nn.LayerNorm(instruction_width) if instruction_width else None
        self.pool = nn.Linear(in_width, width) if pooled_queries else None
        self.layers = nn.ModuleList(
            [SwinQFormerLayer(width, in_width, instruction_width, num_heads) for _ in range(num_layers)]
        )
        self.norm_out = nn.LayerNorm(width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters afresh from the global generator.

        What the layers add begins small, and pooled tokens keep their geometry: training starts near average pooling.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        for parameter in (self.queries, self.null_instruction):
            if parameter is not None:
                nn.init.normal_(parameter, std=QUERY_STD)
        if self.pool is not None:
            width, in_width = self.pool.weight.shape
            nn.init.eye_(self.pool.weight) if width == in_width else nn.init.orthogonal_(self.pool.weight)
            nn.init.zeros_(self.pool.bias)
            for last in (last for layer in self.layers for last in cast("SwinQFormerLayer", layer).last_maps()):
                last.weight.mul_(BRANCH_SCALE)
                nn.init.zeros_(last.bias)

    def answer(self, x_BND: Tensor, grid: Grid, windows: Windows, instruction: Instruction | None) -> Tensor:
        """Answers ``(B, Q, C)`` of one set of queries to each of ``x_BND``."""
        tokens = NormedTokens(x_BND, self.norm_tokens, grid if self.position == "sincos" else None)
        queries = self.queries.expand(x_BND.shape[0], -1, -1)
        if self.pool is not None:
            queries = queries + self.pool(self._share_means(tokens))
        read = self._with_null(instruction, x_BND)
        for layer in self.layers:
            queries = layer(queries, tokens, windows, read)
        answers: Tensor = self.norm_out(queries)
        return answers

    def _share_means(self, tokens: NormedTokens) -> Tensor:
        """Mean of each query's share of the tokens, ``(B, Q, D)``."""
        num_tokens, num_queries = tokens.x.shape[1], self.count.num_queries
        if not absorbs(num_tokens, self.head_width, self.windows(num_tokens)):
            return F.adaptive_avg_pool1d(tokens.values.transpose(1, 2), num_queries).transpose(1, 2)
        return tokens.means(tuple(_share(number, num_queries, num_tokens) for number in range(num_queries)))

    def _with_null(self, instruction: Instruction | None, x_BND: Tensor) -> Instruction | None:
        """Questions with a learned token before them, which is seen where there is no question."""
        if self.null_instruction is None or self.norm_instruction is None:
            return None
        null = self.null_instruction.to(x_BND.dtype).expand(x_BND.shape[0], 1, -1)
        if instruction is None:
            seen = torch.ones(null.shape[:2], dtype=torch.bool, device=x_BND.device)
            return Instruction(self.norm_instruction(null), seen)
        features = torch.cat([null, instruction.features.to(x_BND.dtype)], dim=1)
        empty = ~instruction.mask.any(dim=1, keepdim=True)
        return Instruction(self.norm_instruction(features), torch.cat([empty, instruction.mask], dim=1))


def _share(number: int, num_queries: int, num_tokens: int) -> range:
    """Tokens of which query ``number`` gets the mean, by the rule of adaptive pooling."""
    return range(number * num_tokens // num_queries, -(-(number + 1) * num_tokens // num_queries))


class SwinQFormerLayer(nn.Module):
    """One layer: the question, the window, the feed-forward network.

    Args:
        width: C.
        in_width: D.
        instruction_width: E; 0 for none.
        num_heads: Attention heads.
    """

    def __init__(self, width: int, in_width: int, instruction_width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_read = nn.LayerNorm(width) if instruction_width else None
        self.read = CrossAttention(width, instruction_width, num_heads) if instruction_width else None
        self.norm_look = nn.LayerNorm(width)
        self.look = CrossAttention(width, in_width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def last_maps(self) -> list[nn.Linear]:
        """The maps whose results are added to the queries."""
        return [*(part.out_proj for part in (self.read, self.look) if part), cast("nn.Linear", self.mlp[-1])]

    def forward(
        self, queries: Tensor, tokens: NormedTokens, windows: Windows, instruction: Instruction | None
    ) -> Tensor:
        """Queries ``(B, Q, C)`` after reading the question and looking at the tokens.

        Args:
            queries: ``(B, Q, C)``.
            tokens: NormedTokens with their norm and positions.
            windows: Tokens that each query sees.
            instruction: The question; None for none.
        """
        if self.read is not None and self.norm_read is not None and instruction is not None:
            query, key, value = self.read.project(self.norm_read(queries), *[instruction.features] * 2)
            mask = instruction.mask[:, None, None]
            queries = queries + self.read.merge(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
        queries = queries + self.look.through_windows(self.norm_look(queries), tokens, windows)
        mixed: Tensor = queries + self.mlp(self.norm_mlp(queries))
        return mixed


class CrossAttention(nn.Module):
    """The maps around an attention of queries to something else.

    Args:
        width: Of the queries and the result; ``num_heads`` divides it.
        memory_width: Of what is attended to.
        num_heads: Heads.
    """

    def __init__(self, width: int, memory_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        # a bias of the keys would add the same to all scores of a query, which softmax takes away again
        self.k_proj, self.v_proj = nn.Linear(memory_width, width, bias=False), nn.Linear(memory_width, width)
        self.recorder: Recorder | None = None

    def project(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by heads, ``(B, H, ., C / H)``."""
        return self._split(self.q_proj(queries)), self._split(self.k_proj(keys)), self._split(self.v_proj(values))

    def merge(self, heads: Tensor) -> Tensor:
        """Heads ``(B, H, Q, C / H)`` mixed to ``(B, Q, C)``."""
        mixed: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return mixed

    def through_windows(self, queries: Tensor, tokens: NormedTokens, windows: Windows) -> Tensor:
        """Attention of query i to the tokens ``windows[i]``, ``(B, Q, C)``.

        Args:
            queries: ``(B, Q, C)``.
            tokens: What keys and values are made from.
            windows: Tokens that each query sees.
        """
        if self.recorder is not None:
            self.recorder(
                window_weights(self._split(self.q_proj(queries)), self._split(self.k_proj(tokens.keys)), windows)
            )
        if absorbs(tokens.x.shape[1], self.head_width, windows):
            return self._absorbed(queries, tokens, windows)
        return self.merge(window_attention(*self.project(queries, tokens.keys, tokens.values), windows))

    def _absorbed(self, queries: Tensor, tokens: NormedTokens, windows: Windows) -> Tensor:
        """The same without ever projecting the tokens, of which there are many more than queries.

        ``q (K x) = (q K) x`` and ``sum of a (V x) = V (sum of a x)``: queries go through the keys' map into the width
        of the tokens, where each head is a query of its own, and what they collect goes through the values' map. So do
        the weights of the norm.
        """
        num_batch, num_queries, _ = queries.shape
        heads, head_width, token_width = self.num_heads, self.head_width, tokens.x.shape[2]
        split = (self.q_proj(queries) * head_width**-0.5).view(num_batch, num_queries, heads, head_width)
        mapped = torch.einsum("bqhc,hcd->bqhd", split, self.k_proj.weight.view(heads, head_width, token_width))
        mapped = mapped.flatten(1, 2)
        of_heads = tuple(window for window in windows for _ in range(heads))
        looked = tokens.attend(mapped, of_heads).view(num_batch, num_queries, heads, token_width)
        collected = torch.einsum("bqhd,hcd->bqhc", looked, self.v_proj.weight.view(heads, head_width, token_width))
        mixed: Tensor = self.out_proj(collected.flatten(2) + self.v_proj.bias)
        return mixed

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class LegacySwinQFormer(QueryCompressor):
    """The original's form, weights by its names: one layer, one head, one norm for everything, no residuals.

    Kept to compare with and to load its checkpoints. Its windows leave tokens unseen for many sizes, and padded
    questions are not masked, as in the original.

    Args:
        in_width: D.
        instruction_width: E.
        width: C; the language model's, as no projector followed.
        num_queries: Queries; more than one.
        window: Tokens that each query sees.
    """

    def __init__(self, in_width: int, *, instruction_width: int, width: int, num_queries: int, window: int) -> None:
        super().__init__(width=width, num_queries=num_queries, window=window, scope="frame", reads=True)
        self.Queries = nn.Parameter(torch.empty(1, num_queries, width))
        self.inst_projection = nn.Linear(instruction_width, width)
        self.norm = nn.LayerNorm(width)
        self.to_kv_inst, self.to_out_inst = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.to_kv_mmodal, self.to_out_mmodal = nn.Linear(in_width, 2 * width), nn.Linear(width, width)
        self.recorder: Recorder | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters afresh from the global generator."""
        for module in self.children():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.Queries)

    def windows(self, num_tokens: int) -> Windows:
        """Tokens that each query sees, by the original's arithmetic."""
        return legacy_windows(num_tokens=num_tokens, num_queries=self.count.num_queries, width=self.window)

    def answer(self, x_BND: Tensor, grid: Grid, windows: Windows, instruction: Instruction | None) -> Tensor:
        """Answers ``(B, Q, C)`` to each of ``x_BND``; without a question the queries go on as they are."""
        queries = self.Queries.expand(x_BND.shape[0], -1, -1)
        if instruction is not None:
            key, value = self.to_kv_inst(self.inst_projection(instruction.features)).chunk(2, dim=-1)
            read = F.scaled_dot_product_attention(queries, self.norm(key), self.norm(value))
            queries = self.norm(self.to_out_inst(read))
        key, value = self.to_kv_mmodal(x_BND).chunk(2, dim=-1)
        key, value = self.norm(key).unsqueeze(1), self.norm(value).unsqueeze(1)
        if self.recorder is not None:
            self.recorder(window_weights(queries.unsqueeze(1), key, windows))
        looked = window_attention(queries.unsqueeze(1), key, value, windows).squeeze(1)
        answers: Tensor = self.norm(self.to_out_mmodal(looked))
        return answers


@contextmanager
def recorded_attention(compressor: QueryCompressor) -> Iterator[list[Tensor]]:
    """Context that yields a list, to which each pass adds what its queries attend to, layer by layer.

    An entry is ``(B, H, Q, N)``, float32: B sets of queries (frames of clips are sets of their own under
    ``scope: frame``), N the tokens that a set looks at; zero outside of a query's window.
    """
    seen: list[Tensor] = []
    lookers = [module for module in compressor.modules() if isinstance(module, CrossAttention | LegacySwinQFormer)]
    for module in lookers:
        module.recorder = lambda weights: seen.append(weights.detach())
    try:
        yield seen
    finally:
        for module in lookers:
            module.recorder = None
