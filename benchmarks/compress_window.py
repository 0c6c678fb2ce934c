"""Window attention of 64 queries over windows of 512 tokens: ours and the original's way, which copies every window.

The original is written anew from its description: windows stacked to ``(B, Q, W, D)``, one head. For the attention
alone both get the same inputs, windows and single head, and give the same result. The whole layer is compared at the
width of a 7B language model: the original projects all tokens to 4,096; ours attends in the tower's width of 1,024 and
projects the 64 answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from common import machine, table
from compression import Run, arguments, backward, rows, without_graph
from torch import Tensor, nn

from llava_scale.compressors.base import Context, Instruction
from llava_scale.compressors.swin_qformer import LegacySwinQFormer, SwinQFormer
from llava_scale.compressors.window_attention import Windows, legacy_windows, window_attention

HEADER = ["tokens", "what", "CPU ms", "time against ours", "peak memory over keys and values", "without results"]


def copied(query: Tensor, key: Tensor, value: Tensor, *, windows: Windows) -> Tensor:
    """Attention to stacked copies of the windows, ``(B, Q, D)``."""
    keys = torch.stack([key[:, window.start : window.stop] for window in windows], dim=1)
    values = torch.stack([value[:, window.start : window.stop] for window in windows], dim=1)
    scores = torch.einsum("bqd,bqwd->bqw", query, keys) * query.shape[-1] ** -0.5
    return torch.einsum("bqw,bqwd->bqd", scores.softmax(dim=-1), values)


def viewed(query: Tensor, key: Tensor, value: Tensor, *, windows: Windows) -> Tensor:
    """Ours, with the original's single head."""
    return window_attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), windows).squeeze(1)


class OriginalLayer(LegacySwinQFormer):
    """The original's layer with the original's copies of windows."""

    def answer(self, x_BND: Tensor, grid: object, windows: Windows, instruction: Instruction | None) -> Tensor:
        """Answers ``(B, Q, C)``."""
        assert instruction is not None
        queries = self.Queries.expand(x_BND.shape[0], -1, -1)
        key, value = self.to_kv_inst(self.inst_projection(instruction.features)).chunk(2, dim=-1)
        read = nn.functional.scaled_dot_product_attention(queries, self.norm(key), self.norm(value))
        queries = self.norm(self.to_out_inst(read))
        key, value = self.to_kv_mmodal(x_BND).chunk(2, dim=-1)
        looked = copied(queries, self.norm(key), self.norm(value), windows=windows)
        return self.norm(self.to_out_mmodal(looked))


class OurLayer(nn.Module):
    """One layer of ours in the tower's width, and the map into the language model's."""

    def __init__(self, width: int, out_width: int, instruction_width: int, sizes: dict[str, int]) -> None:
        super().__init__()
        self.compressor = SwinQFormer(width, instruction_width=instruction_width, width=width, num_layers=1, **sizes)
        self.projector = nn.Linear(width, out_width)

    def forward(self, x: Tensor, grid: tuple[int, int, int], context: Context) -> Tensor:
        """Answers ``(B, Q, out_width)``."""
        return self.projector(self.compressor(x, grid, context).tokens)


def attention_rows(num_tokens: int, sizes: dict[str, int], width: int, rounds: int) -> list[list[str]]:
    """Attention alone."""
    windows = legacy_windows(num_tokens=num_tokens, num_queries=sizes["num_queries"], width=sizes["window"])
    inputs = [torch.randn(1, count, width) for count in (sizes["num_queries"], num_tokens, num_tokens)]
    torch.testing.assert_close(viewed(*inputs, windows=windows), copied(*inputs, windows=windows), rtol=1e-3, atol=1e-4)
    size = 2 * inputs[1].numel() * 4
    ways = {"ours": partial(viewed, windows=windows), "original": partial(copied, windows=windows)}
    runs = {name: without_graph(way, *inputs) for name, way in ways.items()}
    lines = rows(f"{num_tokens:,} forward", runs, ours="ours", rounds=rounds, input_bytes=size)
    inputs = [value.requires_grad_() for value in inputs]
    runs = {name: backward(way, *inputs) for name, way in ways.items()}
    return lines + rows(f"{num_tokens:,} forward + backward", runs, ours="ours", rounds=rounds, input_bytes=size)


def layer_rows(num_tokens: int, sizes: dict[str, int], width: int, out_width: int, rounds: int) -> list[list[str]]:
    """The whole layer, forward and backward to its weights."""
    reader_width = 768
    question = Instruction(torch.randn(1, 32, reader_width), torch.ones(1, 32, dtype=torch.bool))
    context, grid = Context(instruction=question), (1, num_tokens // 96, 96)
    x = torch.randn(1, num_tokens, width)
    new = OurLayer(width, out_width, reader_width, sizes)
    old = OriginalLayer(width, instruction_width=reader_width, width=out_width, **sizes)
    legacy = LegacySwinQFormer(width, instruction_width=reader_width, width=out_width, **sizes)
    legacy.load_state_dict(copy.deepcopy(old.state_dict()))

    def trained(module: nn.Module, forward: Callable[[], Tensor]) -> Run:
        parameters = list(module.parameters())

        def run() -> Sequence[Tensor | None]:
            out = forward()
            return torch.autograd.grad(out, parameters, torch.ones_like(out), allow_unused=True)

        return run

    runs = {
        "ours": trained(new, lambda: new(x, grid, context)),
        "ours, legacy form": trained(legacy, lambda: legacy(x, grid, context).tokens),
        "original": trained(old, lambda: old(x, grid, context).tokens),
    }
    size = 2 * num_tokens * out_width * 4
    label = f"{num_tokens:,}, whole layer, forward + backward"
    return rows(label, runs, ours="ours", rounds=rounds, input_bytes=size)


def main() -> None:
    """Print the table."""
    chosen = arguments(__doc__ or "")
    sizes = {"num_queries": 8, "window": 16} if chosen.small else {"num_queries": 64, "window": 512}
    width, out_width = (32, 64) if chosen.small else (1024, 4096)
    lines = []
    for num_tokens in (24, 96, 384) if chosen.small else (576, 2304, 9216):
        lines += attention_rows(num_tokens, sizes, width, chosen.rounds)
    lines += layer_rows(384 if chosen.small else 9216, sizes, width, out_width, max(3, chosen.rounds // 3))
    print(machine())
    print(table(HEADER, lines))


if __name__ == "__main__":
    main()
