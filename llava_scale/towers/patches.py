"""Patch embeddings as one matrix product.

A convolution whose kernel is as large as its stride cuts pictures into patches and maps each by one matrix. Kernels for
convolutions are slow at this shape: they look for a plan whenever the number of pictures changes.

Legend: ``B`` pictures, ``C`` channels, ``R``/``L`` rows and columns of patches, ``P``/``Q`` pixels of one, ``D`` width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchConv2d(nn.Conv2d):
    """A ``Conv2d`` over patches that do not overlap; parameters and results are those of ``Conv2d``."""

    def forward(self, input: Tensor) -> Tensor:
        """Map pictures ``(B, C, H, W)`` to ``(B, D, R, L)``; pixels beyond the last whole patch are left out."""
        height, width = self.kernel_size
        rows, cols = input.shape[2] // height, input.shape[3] // width
        whole = input[:, :, : rows * height, : cols * width]
        pixels_BCRPLQ = whole.reshape(*input.shape[:2], rows, height, cols, width)
        patches = pixels_BCRPLQ.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def use_patch_products(model: nn.Module) -> None:
    """Make every convolution of ``model`` over patches that do not overlap a ``PatchConv2d``, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _cuts_patches(module):
            module.__class__ = PatchConv2d


def _cuts_patches(conv: nn.Conv2d) -> bool:
    unpadded = conv.padding in ("valid", (0, 0))
    return unpadded and conv.groups == 1 and conv.dilation == (1, 1) and conv.stride == conv.kernel_size != (1, 1)
