"""An own vision tower: a few convolutions that make one feature of each 8 x 8 pixels.

Copy this file, put your network in, and name it in a recipe; the module must be on PYTHONPATH::

    PYTHONPATH=examples llava-scale train configs/quickstart.yaml model.vision_tower=own_tower:ConvTower \
        'model.vision_tower_kwargs={width: 96}' 'data.sources=[{path: data/train}]' train.steps=200 \
        train.output_dir=runs/own_tower

Checkpoints hold the tower's weights, its name and its arguments, never its code. A tower that starts from weights of
its own reads them in its constructor: see examples/tuxpaint/efficientnet_tower.py.

Legend: ``B`` pictures, ``C`` channels, ``H``/``W`` pixels or grid cells, ``N`` tokens, ``D`` feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

CELL = 8
"""Pixels per side that one feature stands for: three convolutions, each of stride 2."""


class ConvTower(nn.Module):
    """``(B, 3, H, W)`` normalised pixels to ``(B, rows * columns, width)`` features in raster order.

    Args:
        width: Of the features; divisible by 4.
        image_size: Side of the square pictures in pixels, a multiple of 8.
    """

    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)

    def __init__(self, *, width: int = 64, image_size: int = 64) -> None:
        super().__init__()
        self.hidden_size = width
        self.image_size = image_size
        self.layers = nn.Sequential(
            nn.Conv2d(3, width // 4, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.GroupNorm(4, width),
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of features for a picture of ``height`` x ``width`` pixels."""
        return height // CELL, width // CELL

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return ``(B, N, D)``."""
        maps_BDHW: Tensor = self.layers(pixels_BCHW)
        return maps_BDHW.flatten(2).transpose(1, 2)
