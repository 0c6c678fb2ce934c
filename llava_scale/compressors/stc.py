"""Space and time down by convolution: the connector of VideoLLaMA 2.

Two stages of RegNet bottlenecks with a 3-D convolution between them that makes one token of each window (STC,
arXiv:2406.07476 §2.2). The multilayer perceptron behind it is ours to choose: ``model.projector``, of which
``mlp2x_gelu`` is the paper's. Weights have the names of VideoLLaMA 2's.

Legend: ``B`` media, ``N`` tokens in, ``M`` tokens out, ``T`` frames, ``H``/``W`` rows and columns, ``D`` width of the
tokens, ``C`` width inside and of what comes out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from llava_scale.compressors.base import EVALUATION, CompressedTokens, Context
from llava_scale.compressors.merging import check_grid
from llava_scale.compressors.pooling import on_windows
from llava_scale.compressors.token_merging import Window
from llava_scale.types import Grid

SQUEEZED = 0.25
"""Width inside squeeze-and-excitation, as a share of the block's input, as in RegNet-Y."""


@dataclass(frozen=True, slots=True)
class STCCount:
    """Tokens of an ``STC`` connector.

    Attributes:
        window: Frames, rows and columns that become one token.
    """

    window: Window

    def out_grid(self, grid: Grid) -> Grid:
        """Frames, rows and columns that are left of ``grid``."""
        frames, rows, cols = (math.ceil(limit / side) for limit, side in zip(grid, self.window, strict=True))
        return frames, rows, cols

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Windows in ``grid``, those cut by an edge too, whatever the step."""
        return math.prod(self.out_grid(grid))


class STC(nn.Module):
    """One token for each window of frames, rows and columns, by convolutions that see beyond it.

    Differs from VideoLLaMA 2 at the edges: where a window reaches over the last frame, row or column, that one is
    repeated, so that a single picture is a clip of one frame and no token is lost (the paper's authors repeat pictures
    to a clip's length, pad with zeros in their first version, and drop what is left over in their second).

    Args:
        in_width: D.
        width: C; VideoLLaMA 2 takes the language model's.
        depth: Blocks in each of the two stages.
        window: Frames, rows and columns that become one token.
    """

    needs_instruction = False
    needs_signals = False

    def __init__(self, in_width: int, *, width: int, depth: int = 4, window: Window = (2, 2, 2)) -> None:
        super().__init__()
        self.width, self.count = width, STCCount(window)
        self.s1 = RegStage(in_width, width, depth)
        self.sampler = nn.Sequential(nn.Conv3d(width, width, window, stride=window), nn.SiLU())
        self.s2 = RegStage(width, width, depth)

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Windows in ``grid``, those cut by an edge too, whatever the step."""
        return self.count.num_tokens(grid, step)

    def out_width(self, in_width: int) -> int:
        """C."""
        return self.width

    def forward(self, x_BND: Tensor, grid: Grid, context: Context = EVALUATION) -> CompressedTokens:
        """Compress ``(B, N, D)`` on ``grid`` to ``(B, M, C)``; a token's anchor is the first place of its window.

        Raises:
            ShapeError: ``x_BND`` does not lie on ``grid``.
        """
        check_grid(x_BND, grid)
        num_batch, (frames, rows, cols) = x_BND.shape[0], grid
        maps = x_BND.reshape(num_batch * frames, rows, cols, -1).permute(0, 3, 1, 2)  # channels last, without a copy
        maps = self.s1(maps)
        clip_BCTHW = maps.view(num_batch, frames, *maps.shape[1:]).transpose(1, 2)
        beyond = [(0, -limit % side) for limit, side in zip(grid, self.count.window, strict=True)]
        if any(after for _, after in beyond):
            clip_BCTHW = F.pad(clip_BCTHW, [side for pair in reversed(beyond) for side in pair], mode="replicate")
        clip_BCTHW = self.sampler(clip_BCTHW)
        maps = self.s2(clip_BCTHW.transpose(1, 2).flatten(0, 1))
        tokens = maps.view(num_batch, -1, *maps.shape[1:]).permute(0, 1, 3, 4, 2).flatten(1, 3)
        return on_windows(tokens, grid, self.count.window, self.count.out_grid(grid))

    def reset_parameters(self) -> None:
        """Draw all parameters afresh from the global generator."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.LayerNorm):
                module.reset_parameters()


class RegStage(nn.Module):
    """Bottlenecks one after the other, called ``b1``, ``b2`` ...; the grid stays.

    Args:
        in_width: Of what comes in.
        width: Of what comes out.
        depth: Blocks.
    """

    def __init__(self, in_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        for number in range(depth):
            self.add_module(f"b{number + 1}", Bottleneck(width if number else in_width, width))

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """``(B, C, H, W)``."""
        for number in range(self.depth):
            x_BDHW = self.get_submodule(f"b{number + 1}")(x_BDHW)
        return x_BDHW


class Bottleneck(nn.Module):
    """RegNet-Y's block (arXiv:2003.13678 §5) as VideoLLaMA 2 sets it up: depthwise, with LayerNorm and SiLU.

    Args:
        in_width: Of what comes in.
        width: Of what comes out.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.conv1 = NormedConv(in_width, width)
        self.conv2 = NormedConv(width, width, kernel=3, groups=width)
        self.se = SqueezeExcitation(width, round(in_width * SQUEEZED))
        self.conv3 = NormedConv(width, width)
        self.downsample = NormedConv(in_width, width) if in_width != width else nn.Identity()

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """``(B, C, H, W)``."""
        inner = F.silu(self.conv2(F.silu(self.conv1(x_BDHW))))
        return F.silu(self.conv3(self.se(inner)) + self.downsample(x_BDHW))


class NormedConv(nn.Module):
    """Convolution that keeps the grid, and a norm over the channels of each place.

    Args:
        in_width: Of what comes in.
        width: Of what comes out.
        kernel: Side of the kernel; odd.
        groups: Of channels that do not mix.
    """

    def __init__(self, in_width: int, width: int, *, kernel: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, width, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(width)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """``(B, C, H, W)``."""
        normed: Tensor = self.bn(self.conv(x_BDHW).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed


class SqueezeExcitation(nn.Module):
    """Weighs each channel by what its mean over the picture, among those of the others, says (arXiv:1709.01507).

    Args:
        width: C.
        squeezed: Width inside; at least 1 is taken.
    """

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        squeezed = max(squeezed, 1)
        self.fc1, self.fc2 = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """``(B, C, H, W)``."""
        weight: Tensor = self.fc2(F.silu(self.fc1(x_BDHW.mean(dim=(2, 3), keepdim=True))))
        return x_BDHW * weight.sigmoid()
