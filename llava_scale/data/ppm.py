"""Pictures without compression (binary PPM): pixels that cost a copy instead of decoding."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HEADER = re.compile(rb"P6\s+(\d{1,6})\s+(\d{1,6})\s+255\s")


def ppm_pixels(data: bytes) -> NDArray[np.uint8] | None:
    """Read-only view ``(H, W, 3)`` of an 8-bit RGB PPM.

    None for anything else, and for files with comments or of the wrong length: Pillow knows what they are.
    """
    header = _HEADER.match(data)
    if header is None:
        return None
    width, height = int(header[1]), int(header[2])
    if not width or not height or len(data) != header.end() + 3 * width * height:
        return None
    return np.frombuffer(data, np.uint8, offset=header.end()).reshape(height, width, 3)


def ppm_file(pixels: NDArray[np.uint8]) -> bytes:
    """Return the file of ``(H, W, 3)`` pixels."""
    height, width, _ = pixels.shape
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()
