"""Memory of rows, used again: fresh memory costs the kernel a fault for every 4 KB, as much as tokenising."""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_KEPT = 8  # blocks that wait for their next use
_SPARE = 8  # a new block is larger than asked by one part in this many, since rows differ in pictures

_free: deque[NDArray[np.uint8]] = deque(maxlen=_KEPT)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a contiguous tensor of unspecified values on the CPU, as ``torch.empty``.

    Its memory may have served a tensor that nobody holds any more, nor any view of it.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    block = _take(size)
    held = block[:size]
    weakref.finalize(held, _free.append, block).atexit = False
    return torch.from_numpy(held).view(dtype).view(shape)


def _take(size: int) -> NDArray[np.uint8]:
    """A block of at least ``size`` bytes; smaller ones that waited are given back."""
    while True:
        try:
            block = _free.pop()
        except IndexError:
            return np.empty(size + size // _SPARE, np.uint8)
        if block.size >= size:
            return block
