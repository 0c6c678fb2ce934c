"""Token merging: ours, the original's call (written anew from its description), ToMe for Stable Diffusion's package.

All remove half of the tokens with destinations in 2 x 2 windows. The original drops tokens and makes no gradient, so it
stands in the forward table only; its process group, which it asks for at every call, is left out in its favour.
"""

from __future__ import annotations

from functools import partial

import torch
from common import machine, table
from compression import arguments, backward, rows, without_graph
from torch import Tensor

from llava_scale.compressors.base import Context
from llava_scale.compressors.schedule import RatioSchedule
from llava_scale.compressors.token_merging import LocalTokenMerging

HEADER = ["input", "what", "CPU ms", "time against ours", "peak memory over the input's", "without results"]


def ours(x: Tensor, *, grid: tuple[int, int, int], scope: str = "frame", mode: str = "merge") -> Tensor:
    """Our merging at training, with random destinations."""
    merging = LocalTokenMerging(schedule=RatioSchedule(final=0.5), scope=scope, mode=mode)
    return merging(x, grid, Context(step=1)).tokens


def original(x: Tensor, *, rows_: int, cols: int) -> Tensor:
    """The original's steps on one grid: partition, normalised copies, scores, and the drop by its indices."""
    with torch.no_grad():
        num_batch, num_tokens, width = x.shape
        high, wide = rows_ // 2, cols // 2
        chosen = torch.randint(4, (high, wide, 1))
        windows = torch.zeros(high, wide, 4, dtype=torch.int64)
        windows.scatter_(2, chosen, torch.full_like(chosen, -1))
        order = windows.view(high, wide, 2, 2).transpose(1, 2).reshape(1, -1, 1).argsort(dim=1)
        dst, src = order[:, : high * wide], order[:, high * wide :]
        unit = x / x.norm(dim=-1, keepdim=True)
        src_x = unit.gather(1, src.expand(num_batch, -1, width))
        dst_x = unit.gather(1, dst.expand(num_batch, -1, width))
        best, _ = (src_x @ dst_x.transpose(1, 2)).max(dim=-1)
        dropped = best.argsort(dim=-1, descending=True)[:, : num_tokens // 2]
        keep = torch.ones(num_batch, num_tokens, dtype=torch.bool).scatter_(1, dropped, False)
        return x[keep].view(num_batch, -1, width)


def tomesd_merge(x: Tensor, *, rows_: int, cols: int) -> Tensor:
    """The package's matching and merging."""
    from tomesd.merge import bipartite_soft_matching_random2d

    generator = torch.Generator().manual_seed(0)
    merge, _ = bipartite_soft_matching_random2d(x, cols, rows_, 2, 2, x.shape[1] // 2, False, generator)
    return merge(x, mode="mean")


def main() -> None:
    """Print the tables."""
    chosen = arguments(__doc__ or "")
    side = 8 if chosen.small else 24
    width = 64 if chosen.small else 1024
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        x = torch.randn(8, side * side, width).to(dtype)
        grid = (1, side, side)
        size = x.numel() * x.element_size()
        shown = f"{tuple(x.shape)} {name}"
        runs = {
            "ours": without_graph(partial(ours, grid=grid), x),
            "ours, prune": without_graph(partial(ours, grid=grid, mode="prune"), x),
            "original": without_graph(partial(original, rows_=side, cols=side), x),
            "tomesd": without_graph(partial(tomesd_merge, rows_=side, cols=side), x),
        }
        lines += rows(f"forward {shown}", runs, ours="ours", rounds=chosen.rounds, input_bytes=size)
        clip = torch.randn(1, 16 * side * side, width).to(dtype)
        grid, tall = (16, side, side), 16 * side
        size = clip.numel() * clip.element_size()
        runs = {
            "ours, frame scope": without_graph(partial(ours, grid=grid), clip),
            "ours, clip scope": without_graph(partial(ours, grid=grid, scope="clip"), clip),
            "original, whole clip": without_graph(partial(original, rows_=tall, cols=side), clip),
        }
        few = max(3, chosen.rounds // 3)
        lines += rows(f"forward clip of 16 {name}", runs, ours="ours, frame scope", rounds=few, input_bytes=size)
        x = x.requires_grad_()
        runs = {
            "ours": backward(partial(ours, grid=(1, side, side)), x),
            "tomesd": backward(partial(tomesd_merge, rows_=side, cols=side), x),
        }
        size = x.numel() * x.element_size()
        lines += rows(f"forward + backward {shown}", runs, ours="ours", rounds=chosen.rounds, input_bytes=size)
    print(machine())
    print(table(HEADER, lines))


if __name__ == "__main__":
    main()
