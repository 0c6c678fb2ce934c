"""JPEG: headers without a library, and decoding by simplejpeg where it is installed.

Pillow stays the judge: whatever this module has doubts about, it leaves to Pillow by returning None, so that a file
gives the same picture, or the same error, with and without the extra.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

try:
    import simplejpeg
except ImportError:  # the extra [image] is optional: Pillow decodes the same picture more slowly
    simplejpeg = None

UPRIGHT = 1
"""EXIF orientation of a picture that needs no turning."""

_APP1, _SOS = 0xE1, 0xDA
_FRAME_HEADERS = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; the rest is rare and left to Pillow
_OTHER_FRAME_HEADERS = set(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = {0x01, *range(0xD0, 0xD9)}
_EXIF = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112


class JpegHeader(NamedTuple):
    """Size as stored and EXIF orientation (1 to 8)."""

    width: int
    height: int
    orientation: int


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Header of an 8-bit grey or colour JPEG; None for anything else (other formats, CMYK, damaged)."""
    if data[:2] != b"\xff\xd8":
        return None
    size: tuple[int, int] | None = None
    exif = b""
    for marker, start, end in _segments(data):
        if marker in _FRAME_HEADERS:
            if end - start < 6 or data[start] != 8 or data[start + 5] not in (1, 3):
                return None
            height, width = struct.unpack_from(">HH", data, start + 1)
            size = (width, height)
        elif marker in _OTHER_FRAME_HEADERS:
            return None
        elif marker == _APP1 and not exif and data.startswith(_EXIF, start):
            exif = data[start + len(_EXIF) : end]
        elif marker == _SOS:
            if size is None or not size[0] or not size[1]:
                return None
            return JpegHeader(*size, exif_orientation(exif))
    return None


def _segments(data: bytes) -> Any:
    """Marker, start and end of the payload of each segment, up to the first scan or damage."""
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _STANDALONE:
            position += 2
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if end > len(data) or end < position + 4:
            return
        yield marker, position + 4, end
        position = end


def exif_orientation(exif: bytes) -> int:
    """Orientation (1 to 8) in a TIFF-structured EXIF block, with or without its ``Exif`` prefix; 1 if unreadable."""
    if exif.startswith(_EXIF):
        exif = exif[len(_EXIF) :]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return UPRIGHT
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (num_entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * num_entries, 12):
            tag, _type, _count, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == _ORIENTATION_TAG:
                return value if 1 <= value <= 8 else UPRIGHT
    except struct.error:
        pass
    return UPRIGHT


def decode_jpeg(
    data: bytes, header: JpegHeader, *, reduction: int, into: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8] | None:
    """Pixels ``(ceil(H / reduction), ceil(W / reduction), 3)`` as stored; None where Pillow should do it.

    Args:
        data: The file.
        header: Of this file.
        reduction: 1, 2, 4 or 8: shrink while decoding (libjpeg's scaled inverse transform).
        into: C-contiguous memory of the result; left in any state where None is returned.
    """
    if simplejpeg is None:
        return None
    least_height, least_width = -(-header.height // reduction), -(-header.width // reduction)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data,
            "RGB",
            min_height=least_height if reduction > 1 else 0,
            min_width=least_width if reduction > 1 else 0,
            buffer=None if into is None else into.reshape(-1),
        )
    except ValueError:  # damaged, or only untidy: Pillow knows which
        return None
    return pixels if pixels.shape == (least_height, least_width, 3) else None
