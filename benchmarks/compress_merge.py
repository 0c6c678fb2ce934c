"""Token merging: ours, the original's call (written anew from its description), ToMe for Stable Diffusion's package.

All remove half of the tokens with destinations in 2 x 2 windows. The original drops tokens and makes no gradient, so it
stands in the forward table only; its process group, which it asks for at every call, is left out in its favour. The
floor copies every other token and nothing else.
"""

from __future__ import annotations

from functools import partial

import torch
from common import table
from compression import Meter, Run, arguments, backward, without_graph
from torch import Tensor

from llava_scale.compressors.base import Context
from llava_scale.compressors.schedule import RatioSchedule
from llava_scale.compressors.token_merging import LocalTokenMerging

HEADER = ["input", "what", "ms", "time against ours", "peak memory over the input's", "without results"]


def ours(x: Tensor, *, grid: tuple[int, int, int], scope: str = "frame", mode: str = "merge") -> Tensor:
    """Our merging at training, with random destinations."""
    merging = LocalTokenMerging(schedule=RatioSchedule(final=0.5), scope=scope, mode=mode)
    return merging(x, grid, Context(step=1)).tokens


def original(x: Tensor, *, rows_: int, cols: int) -> Tensor:
    """The original's steps on one grid: partition, normalised copies, scores, and the drop by its indices."""
    with torch.no_grad():
        num_batch, num_tokens, width = x.shape
        high, wide = rows_ // 2, cols // 2
        chosen = torch.randint(4, (high, wide, 1), device=x.device)
        windows = torch.zeros(high, wide, 4, dtype=torch.int64, device=x.device)
        windows.scatter_(2, chosen, torch.full_like(chosen, -1))
        order = windows.view(high, wide, 2, 2).transpose(1, 2).reshape(1, -1, 1).argsort(dim=1)
        dst, src = order[:, : high * wide], order[:, high * wide :]
        unit = x / x.norm(dim=-1, keepdim=True)
        src_x = unit.gather(1, src.expand(num_batch, -1, width))
        dst_x = unit.gather(1, dst.expand(num_batch, -1, width))
        best, _ = (src_x @ dst_x.transpose(1, 2)).max(dim=-1)
        dropped = best.argsort(dim=-1, descending=True)[:, : num_tokens // 2]
        keep = torch.ones(num_batch, num_tokens, dtype=torch.bool, device=x.device).scatter_(1, dropped, False)
        return x[keep].view(num_batch, -1, width)


def tomesd_merge(x: Tensor, *, rows_: int, cols: int) -> Tensor:
    """The package's matching and merging."""
    from tomesd.merge import bipartite_soft_matching_random2d

    generator = torch.Generator(x.device).manual_seed(0)
    merge, _ = bipartite_soft_matching_random2d(x, cols, rows_, 2, 2, x.shape[1] // 2, False, generator)
    return merge(x, mode="mean")


def floor(x: Tensor) -> Tensor:
    """Half of the tokens, copied."""
    return x[:, ::2].contiguous()


def lines_of(meter: Meter, dtype: torch.dtype, width: int, side: int) -> list[list[str]]:
    """Pictures and a clip forward, pictures forward and backward."""
    name = f"{str(dtype).removeprefix('torch.')}"
    x = torch.randn(8, side * side, width, device=meter.device).to(dtype)
    size, shown = x.numel() * x.element_size(), f"{tuple(x.shape)} {name}"
    grid = (1, side, side)
    runs: dict[str, Run] = {
        "ours": without_graph(partial(ours, grid=grid), x),
        "ours, prune": without_graph(partial(ours, grid=grid, mode="prune"), x),
        "original": without_graph(partial(original, rows_=side, cols=side), x),
        "tomesd": without_graph(partial(tomesd_merge, rows_=side, cols=side), x),
        "floor": without_graph(floor, x),
    }
    lines = meter.rows(f"forward {shown}", runs, ours="ours", input_bytes=size)
    clip = torch.randn(1, 16 * side * side, width, device=meter.device).to(dtype)
    grid, tall = (16, side, side), 16 * side
    runs = {
        "ours, frame scope": without_graph(partial(ours, grid=grid), clip),
        "ours, clip scope": without_graph(partial(ours, grid=grid, scope="clip"), clip),
        "original, whole clip": without_graph(partial(original, rows_=tall, cols=side), clip),
        "floor": without_graph(floor, clip),
    }
    few, size = max(3, meter.rounds // 3), clip.numel() * clip.element_size()
    lines += meter.rows(f"forward clip of 16 {name}", runs, ours="ours, frame scope", rounds=few, input_bytes=size)
    x = x.requires_grad_()
    runs = {
        "ours": backward(partial(ours, grid=(1, side, side)), x),
        "tomesd": backward(partial(tomesd_merge, rows_=side, cols=side), x),
    }
    size = x.numel() * x.element_size()
    return lines + meter.rows(f"forward + backward {shown}", runs, ours="ours", input_bytes=size)


def main() -> None:
    """Print the tables."""
    chosen = arguments(__doc__ or "", widths=[1024])
    meter = Meter(torch.device(chosen.device), chosen.rounds)
    side = 8 if chosen.small else 24
    dtypes = [torch.bfloat16] if chosen.device != "cpu" else [torch.float32, torch.bfloat16]
    widths = [64] if chosen.small else chosen.widths
    lines = [line for width in widths for dtype in dtypes for line in lines_of(meter, dtype, width, side)]
    print(meter.place)
    print(table(HEADER, lines))


if __name__ == "__main__":
    main()
