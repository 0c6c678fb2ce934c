"""EfficientNet-Lite0 as a vision tower: one picture in, a grid of 1,280 features out.

The network is that of Tan and Le (arXiv:1905.11946) in its "lite" form: no squeeze-and-excitation, ReLU6, stem and
head of fixed width. Batch norms are folded into the convolutions when the weights are read: the tower computes the
same in training and evaluation mode, holds no running statistics that training could spoil, and is faster.

Legend: ``B`` pictures, ``C`` channels, ``H``/``W`` pixels or grid cells, ``N`` tokens, ``D`` feature width.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from llava_scale.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

logger = logging.getLogger(__name__)

STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
"""Kernel, stride, expansion, channels and repeats of each stage."""
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
NUM_CLASSES = 1000
REDUCTION = 32
"""Pixels per side that one cell of the network's last grid stands for."""
BATCH_NORM_EPS = 1e-3


class SamePadConv(nn.Conv2d):
    """Convolution padded as TensorFlow's ``SAME``: the odd pixel goes to the right and the bottom."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return ``(B, out_channels, ceil(H / stride), ceil(W / stride))``."""
        rows = _padding(x_BCHW.shape[2], self.kernel_size[0], self.stride[0])
        columns = _padding(x_BCHW.shape[3], self.kernel_size[1], self.stride[1])
        if rows[0] == rows[1] and columns[0] == columns[1]:
            return F.conv2d(x_BCHW, self.weight, self.bias, self.stride, (rows[0], columns[0]), 1, self.groups)
        padded = F.pad(x_BCHW, (*columns, *rows))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, 1, self.groups)


def _padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class InvertedBottleneck(nn.Module):
    """Widen, depthwise convolution, narrow; added to its input where the shapes agree (MobileNetV2's block)."""

    def __init__(self, channels_in: int, channels_out: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.has_skip = stride == 1 and channels_in == channels_out
        self.expand = SamePadConv(channels_in, inner, 1) if expansion != 1 else None
        self.depthwise = SamePadConv(inner, inner, kernel, stride=stride, groups=inner)
        self.project = SamePadConv(inner, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the block's features; the grid shrinks by its stride."""
        hidden = x_BCHW if self.expand is None else F.relu6(self.expand(x_BCHW))
        hidden = F.relu6(self.depthwise(hidden))
        narrow: Tensor = self.project(hidden)
        return x_BCHW + narrow if self.has_skip else narrow


class EfficientNetLite0(nn.Module):
    """The tower: ``(B, 3, H, W)`` normalised pixels to ``(B, rows * columns, 1280)`` features in raster order.

    Args:
        weights: PyTorch state dict of the original network to start from; empty leaves random weights. A file that
            has gone leaves NaN and a warning: a checkpoint can be loaded over it, but nothing else works by accident.
        image_size: Side of the square pictures in pixels, a multiple of 32.
        pool: Side of the grid that the last features are averaged to; 0 keeps the network's own (7 at 224 pixels).

    Raises:
        CheckpointError: ``weights`` is not a state dict of this network.
        ConfigError: ``image_size`` or ``pool`` do not fit.
    """

    image_mean = (127 / 255, 127 / 255, 127 / 255)
    image_std = (128 / 255, 128 / 255, 128 / 255)
    hidden_size = HEAD_CHANNELS

    def __init__(self, *, weights: str = "", image_size: int = 224, pool: int = 0) -> None:
        super().__init__()
        if image_size < REDUCTION or image_size % REDUCTION:
            raise ConfigError(f"image_size must be a multiple of {REDUCTION}, got {image_size}")
        if not 0 <= pool <= image_size // REDUCTION:
            raise ConfigError(f"pool must be 0 to {image_size // REDUCTION} for {image_size} pixels, got {pool}")
        self.image_size = image_size
        self.pool = pool
        self.stem = SamePadConv(3, STEM_CHANNELS, 3, stride=2)
        self.blocks = nn.ModuleList(_blocks())
        self.head = SamePadConv(STAGES[-1][3], HEAD_CHANNELS, 1)
        if weights:
            self._load(Path(weights))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of features for a picture of ``height`` x ``width`` pixels."""
        if self.pool:
            return self.pool, self.pool
        return -(-height // REDUCTION), -(-width // REDUCTION)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return ``(B, N, D)``: one feature a grid cell, after the last convolution and its ReLU6."""
        hidden = x_BCHW.contiguous(memory_format=torch.channels_last)
        hidden = F.relu6(self.stem(hidden))
        for block in self.blocks:
            hidden = block(hidden)
        hidden = F.relu6(self.head(hidden))
        if self.pool:
            hidden = F.adaptive_avg_pool2d(hidden, self.pool)
        return hidden.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        if not path.exists():
            logger.warning("%s has gone; the tower holds NaN until a checkpoint is loaded over it", path)
            for parameter in self.parameters():
                parameter.fill_(float("nan"))
            return
        try:
            self.load_state_dict(folded_state(read_state(path), self))
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not an EfficientNet-Lite0: {error}") from None


class EfficientNetLite0Classifier(nn.Module):
    """The tower with its ImageNet head, to check that weights and pixels fit together.

    Args:
        weights: Weight file, as for the tower.
    """

    def __init__(self, *, weights: str) -> None:
        super().__init__()
        self.tower = EfficientNetLite0(weights=weights)
        self.classifier = nn.Linear(HEAD_CHANNELS, NUM_CLASSES)
        state = read_state(Path(weights))
        self.classifier.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return ``(B, 1000)`` logits over the ImageNet classes."""
        logits: Tensor = self.classifier(self.tower(x_BCHW).mean(dim=1))
        return logits


def read_state(path: Path) -> dict[str, Tensor]:
    """Return a state dict from a weight file; nothing but tensors is unpickled.

    Raises:
        CheckpointError: the file is missing or holds anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"weight file {path} does not exist") from None
    except Exception as error:  # torch raises pickle's errors, RuntimeError, EOFError
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def folded_state(original: Mapping[str, Tensor], tower: EfficientNetLite0) -> dict[str, Tensor]:
    """Return the tower's state from the original network's, each batch norm folded into the convolution before it.

    Raises:
        KeyError: ``original`` lacks a parameter.
    """
    pairs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for number, block in enumerate(tower.blocks):
        assert isinstance(block, InvertedBottleneck)
        ours, theirs = f"blocks.{number}", f"_blocks.{number}"
        if block.expand is not None:
            pairs[f"{ours}.expand"] = (f"{theirs}._expand_conv", f"{theirs}._bn0")
        pairs[f"{ours}.depthwise"] = (f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        pairs[f"{ours}.project"] = (f"{theirs}._project_conv", f"{theirs}._bn2")
    state = {}
    for name, (conv, norm) in pairs.items():
        gain = original[f"{norm}.weight"] / torch.sqrt(original[f"{norm}.running_var"] + BATCH_NORM_EPS)
        state[f"{name}.weight"] = original[f"{conv}.weight"] * gain.view(-1, 1, 1, 1)
        state[f"{name}.bias"] = original[f"{norm}.bias"] - original[f"{norm}.running_mean"] * gain
    return state


def _blocks() -> list[InvertedBottleneck]:
    blocks = []
    width = STEM_CHANNELS
    for kernel, first_stride, expansion, channels, repeats in STAGES:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            blocks.append(InvertedBottleneck(width, channels, kernel=kernel, stride=stride, expansion=expansion))
            width = channels
    return blocks
