"""Window attention of 64 queries over windows of 512 tokens: ours and the original's way, which copies every window.

The original is written anew from its description: windows stacked to ``(B, Q, W, D)``, one head. For the attention
alone both get the same inputs, windows and heads (one, as the original has, unless told otherwise), and give the same
result. The floor is torch's attention of the same queries to all tokens without a mask. The whole layer is compared at
the width of a 7B language model: the original projects all tokens to 4,096; ours attends in the tower's width of 1,024
and projects the 64 answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from common import table
from compression import Meter, Run, arguments, backward, without_graph
from torch import Tensor, nn

from llava_scale.compressors.base import Context, Instruction
from llava_scale.compressors.swin_qformer import LegacySwinQFormer, SwinQFormer
from llava_scale.compressors.window_attention import Windows, legacy_windows, window_attention

HEADER = ["tokens", "what", "ms", "time against ours", "peak memory over keys and values", "without results"]


def copied(query: Tensor, key: Tensor, value: Tensor, *, windows: Windows) -> Tensor:
    """Attention to stacked copies of the windows, ``(B, H, Q, D)``."""
    keys = torch.stack([key[:, :, window.start : window.stop] for window in windows], dim=2)
    values = torch.stack([value[:, :, window.start : window.stop] for window in windows], dim=2)
    scores = torch.einsum("bhqd,bhqwd->bhqw", query, keys) * query.shape[-1] ** -0.5
    return torch.einsum("bhqw,bhqwd->bhqd", scores.softmax(dim=-1), values)


def floor(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention to all tokens."""
    return nn.functional.scaled_dot_product_attention(query, key, value)


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
        heads = (part.unsqueeze(1) for part in (queries, self.norm(key), self.norm(value)))
        looked = copied(*heads, windows=windows).squeeze(1)
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


def attention_rows(meter: Meter, num_tokens: int, sizes: dict[str, int], width: int, heads: int) -> list[list[str]]:
    """Attention alone."""
    windows = legacy_windows(num_tokens=num_tokens, num_queries=sizes["num_queries"], width=sizes["window"])
    dtype = torch.float32 if meter.device.type == "cpu" else torch.bfloat16
    counts = (sizes["num_queries"], num_tokens, num_tokens)
    inputs = [torch.randn(1, heads, count, width // heads, device=meter.device).to(dtype) for count in counts]
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(window_attention(*inputs, windows), copied(*inputs, windows=windows), **close)
    size = 2 * inputs[1].numel() * inputs[1].element_size()
    ways: dict[str, Callable[..., Tensor]] = {
        "ours": partial(window_attention, windows=windows),
        "original": partial(copied, windows=windows),
        "floor": floor,
    }
    label = f"{num_tokens:,} of {width}"
    runs = {name: without_graph(way, *inputs) for name, way in ways.items()}
    lines = meter.rows(f"{label} forward", runs, ours="ours", input_bytes=size)
    inputs = [value.requires_grad_() for value in inputs]
    runs = {name: backward(way, *inputs) for name, way in ways.items()}
    return lines + meter.rows(f"{label} forward + backward", runs, ours="ours", input_bytes=size)


def layer_rows(meter: Meter, num_tokens: int, sizes: dict[str, int], width: int, out_width: int) -> list[list[str]]:
    """The whole layer, forward and backward to its weights."""
    reader_width = 768
    dtype = torch.float32 if meter.device.type == "cpu" else torch.bfloat16
    place = {"device": meter.device, "dtype": dtype}
    question = Instruction(torch.randn(1, 32, reader_width, **place), torch.ones(1, 32).bool().to(meter.device))
    context, grid = Context(instruction=question), (1, num_tokens // 96, 96)
    x = torch.randn(1, num_tokens, width, **place)
    new = OurLayer(width, out_width, reader_width, sizes).to(**place)
    old = OriginalLayer(width, instruction_width=reader_width, width=out_width, **sizes).to(**place)
    legacy = LegacySwinQFormer(width, instruction_width=reader_width, width=out_width, **sizes).to(**place)
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
    size = 2 * num_tokens * out_width * x.element_size()
    label = f"{num_tokens:,}, whole layer, forward + backward"
    return meter.rows(label, runs, ours="ours", rounds=max(3, meter.rounds // 3), input_bytes=size)


def main() -> None:
    """Print the table."""
    chosen = arguments(__doc__ or "", widths=[1024])
    meter = Meter(torch.device(chosen.device), chosen.rounds)
    sizes = {"num_queries": 8, "window": 16} if chosen.small else {"num_queries": 64, "window": 512}
    width, out_width = (32, 64) if chosen.small else (1024, 4096)
    lines = []
    for own in [width] if chosen.small else chosen.widths:
        heads = 1 if chosen.device == "cpu" else max(1, own // 128)  # kernels for GPUs know narrow heads only
        for num_tokens in (24, 96, 384) if chosen.small else (576, 2304, 9216):
            lines += attention_rows(meter, num_tokens, sizes, own, heads)
    lines += layer_rows(meter, 384 if chosen.small else 9216, sizes, width, out_width)
    print(meter.place)
    print(table(HEADER, lines))


if __name__ == "__main__":
    main()
