"""Encoded media to tensors: pictures to uint8 pixels, and the sizes of any medium from its header.

Legend: ``H``/``W`` pixels, ``S`` side of the model's square picture. Everything stays uint8 and channels-last in
memory; the model scales and normalises on its device.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional

from llava_scale.data.jpeg import UPRIGHT, JpegHeader, decode_jpeg, exif_orientation, jpeg_header
from llava_scale.data.names import EXTENSIONS
from llava_scale.data.ppm import ppm_pixels
from llava_scale.data.probing import probe_container
from llava_scale.errors import ConfigError, SampleError, ShapeError, suggest
from llava_scale.types import Clip, MediaInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow opens a multi-picture MPO as its JPEG
_DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_BAND_PIXELS = 1 << 18
"""Pixels of a padded band of rows; small enough for the processor's cache."""

_THIN = 8
"""Height over width above which a padded picture is resized by columns first."""

_TURNS: dict[int, Callable[[Any], Any]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}
"""EXIF orientation -> the turn of ``(H, W, 3)`` that makes the picture upright."""


def decode_image(data: bytes, *, max_pixels: int) -> Tensor:
    """Upright RGB pixels of a picture: uint8 ``(3, H, W)``, channels-last in memory.

    The format is told by the bytes, not by a file name: JPEG, PNG, WebP, GIF, BMP, TIFF, PPM. EXIF orientation is
    applied; transparency is laid on white; CMYK, palettes and grey become RGB (colour profiles are ignored); 16-bit
    grey is scaled by 1/257; of an animation or a multi-page file the first picture is taken.

    Raises:
        SampleError: unreadable, truncated or unsupported picture, or more than ``max_pixels`` pixels (seen in the
            header, before anything is decoded; above 179 million pixels Pillow's own limit acts too).
    """
    pixels = _decode(data, jpeg_header(data), max_pixels=max_pixels, reduction_for=lambda width, height: 1)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def probe(ext: str, data: bytes, clip: Clip | None = None) -> MediaInfo:
    """Size, frames and duration of a medium; nothing is decoded.

    What a container's header does not tell (frames of WebM and Matroska, the length of some MP3s) is counted from its
    packets.

    Args:
        ext: File extension without dot; it decides the kind.
        data: The whole file.
        clip: Seconds of a video or sound that are used; None for all.

    Returns:
        Width and height of pictures as they are after EXIF orientation, of videos as they are stored.

    Raises:
        SampleError: unknown extension, a header that cannot be read, or a clip behind the end.
    """
    kind = EXTENSIONS.get(ext.lower())
    if kind is None:
        raise SampleError(f"unknown media extension {ext!r}; {suggest(ext, EXTENSIONS)}")
    if kind == "image":
        width, height, orientation = jpeg_header(data) or _pillow_size(data)
        if orientation > 4:
            width, height = height, width
        return MediaInfo(kind="image", width=width, height=height, num_frames=1)
    return probe_container(kind, data, clip)


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """Encoded picture -> uint8 ``(3, size, size)``: decode, make square, resize (bicubic with antialias).

    Against Pillow's resize as used by transformers' image processors: at most 2/255 off, in the mean below
    0.02/255 where the picture shrinks (4/255 for pictures over 8 times as tall as wide). Scaled JPEG decoding
    (``jpeg_scaling``) adds a mean of 0.2 to 0.7/255, at most about 6/255, on photos of 4 times ``size`` and more.

    Attributes:
        size: Side of the square in pixels.
        aspect: ``pad`` centres the picture on a square of ``background`` first, as LLaVA does; ``resize`` stretches.
        background: Red, green, blue of the padding, 0 to 255; LLaVA takes ``int(255 * mean)``.
        max_pixels: Pictures with more are refused before they are decoded.
        jpeg_scaling: Decode JPEGs at 1/2, 1/4 or 1/8 where that leaves at least twice ``size``.
    """

    size: int
    aspect: Literal["pad", "resize"] = "pad"
    background: tuple[int, int, int] = (127, 127, 127)
    max_pixels: int = 100_000_000
    jpeg_scaling: bool = True

    def __post_init__(self) -> None:
        if self.size < 1 or self.max_pixels < 1:
            raise ConfigError(f"image size and max_pixels must be positive, got {self.size} and {self.max_pixels}")
        if self.aspect not in ("pad", "resize"):
            raise ConfigError(f"unknown image aspect {self.aspect!r}; {suggest(str(self.aspect), ('pad', 'resize'))}")
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise ConfigError(f"background must be three values from 0 to 255, got {self.background}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of every picture."""
        return (3, self.size, self.size)

    def __call__(self, data: bytes, out: Tensor | None = None) -> Tensor:
        """Decode and fit one encoded picture.

        Args:
            data: The file.
            out: uint8 ``(3, size, size)`` of any strides to write into; cheapest where its memory is channels-last
                (``torch.empty(n, 3, S, S, dtype=torch.uint8, memory_format=torch.channels_last)[i]``).

        Returns:
            ``out``, or a new tensor whose memory is channels-last.

        Raises:
            SampleError: as ``decode_image``.
            ShapeError: if ``out`` has another shape or type.
        """
        header = jpeg_header(data)
        if out is not None and self._decode_in_place(data, header, out):
            return out
        pixels = _decode(data, header, max_pixels=self.max_pixels, reduction_for=self.reduction)
        return self._fit(torch.from_numpy(pixels), out)

    def _decode_in_place(self, data: bytes, header: JpegHeader | None, out: Tensor) -> bool:
        """Decode a picture whose longer side is that of the square into ``out``; whether that was possible."""
        plain = ppm_pixels(data) if header is None else None
        if header is not None:
            width, height, orientation = header
        elif plain is not None:
            (height, width, _), orientation = plain.shape, UPRIGHT
        else:
            return False
        size = self.size
        fits = max(height, width) == size and (height == width or self.aspect == "pad")
        if not fits or orientation != UPRIGHT or out.shape != self.shape or out.dtype != torch.uint8:
            return False
        _check_pixels(width, height, self.max_pixels)
        square = out.permute(1, 2, 0).numpy()
        top, left = (size - height) // 2, (size - width) // 2
        inside = square[top : top + height, left : left + width]
        into = inside if header is not None and inside.flags.c_contiguous else None
        if header is not None:
            plain = decode_jpeg(data, header, reduction=1, into=into)
            if plain is None:
                return False
        if into is None:
            inside[...] = plain
        _fill_bars(square, inside, self.background)
        return True

    def from_tensor(self, pixels: Tensor, out: Tensor | None = None) -> Tensor:
        """Fit decoded pixels, uint8 ``(3, H, W)`` of any strides; otherwise as calling the transform.

        Raises:
            ShapeError: if ``pixels`` is not uint8 ``(3, H, W)`` with at least one pixel.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
            raise ShapeError(f"pixels must be uint8 (3, H, W), got {pixels.dtype} {tuple(pixels.shape)}")
        own = pixels.permute(1, 2, 0)
        own = own.clone(memory_format=torch.contiguous_format) if out is None else own.contiguous()
        return self._fit(own, out)

    def reduction(self, width: int, height: int) -> int:
        """How far a picture may be shrunk while decoding without shifting it against its padding: 1, 2, 4 or 8."""
        if not self.jpeg_scaling:
            return 1
        if self.aspect == "resize":
            decisive, start_pos = min(width, height), 0
        else:
            decisive, start_pos = max(width, height), abs(width - height) // 2
        factors = (factor for factor in (8, 4, 2) if decisive >= 2 * self.size * factor)
        return next((factor for factor in factors if not (width % factor or height % factor or start_pos % factor)), 1)

    def _fit(self, pixels: Tensor, out: Tensor | None) -> Tensor:
        if out is not None and (out.dtype != torch.uint8 or out.shape != (3, self.size, self.size)):
            raise ShapeError(f"out must be uint8 (3, {self.size}, {self.size}), got {out.dtype} {tuple(out.shape)}")
        height, width, _ = pixels.shape
        lying = self.aspect == "pad" and height > _THIN * width  # columns first: never fill a huge square's rows
        if lying:
            pixels = pixels.transpose(0, 1).contiguous()
        if self.aspect == "pad" and height != width:
            pixels = self._pad(pixels)
        fitted = _resize(pixels, self.size, self.size)
        if lying:
            fitted = fitted.transpose(0, 1).contiguous()
        fitted = fitted.permute(2, 0, 1)
        return fitted if out is None else out.copy_(fitted)

    def _pad(self, pixels: Tensor) -> Tensor:
        """The padded square with its rows resized: ``(H, W, 3)`` -> ``(max(H, W), size, 3)``.

        The same as building the whole square first, for less work and memory: rows of pure background are never
        resized, and bars beside the picture exist only for a band of rows at a time.
        """
        height, width, _ = pixels.shape
        side = max(height, width)
        start = (side - min(height, width)) // 2
        end = start + min(height, width)
        rows = pixels.new_empty(side, self.size, 3)
        if width > height:
            bar = _background_row(self.background, self.size)
            flat = rows.view(side, -1)
            flat[:start], flat[end:] = bar, bar
            rows[start:end] = _resize(pixels, height, self.size)
            return rows
        band = pixels.new_empty(min(side, max(1, _BAND_PIXELS // side)), side, 3)
        bar = _background_row(self.background, side)
        flat = band.view(len(band), -1)
        flat[:, : 3 * start], flat[:, 3 * end :] = bar[: 3 * start], bar[3 * end :]
        for top in range(0, side, len(band)):
            part = band[: side - top]
            part[:, start:end] = pixels[top : top + len(part)]
            rows[top : top + len(part)] = _resize(part, len(part), self.size)
        return rows


def _fill_bars(square: NDArray[np.uint8], picture: NDArray[np.uint8], background: tuple[int, int, int]) -> None:
    """Paint what ``square`` holds above, below and beside the picture in its middle."""
    size, (height, width, _) = len(square), picture.shape
    top, left = (size - height) // 2, (size - width) // 2
    row = _background_row(background, size).numpy().reshape(size, 3)
    square[:top] = square[top + height :] = row
    square[:, :left], square[:, left + width :] = row[:left], row[left + width :]


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """``(H, W, 3)`` -> ``(height, width, 3)``, both contiguous: torch's fastest layout for uint8."""
    if pixels.shape[:2] == (height, width):
        return pixels
    image = pixels[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0)


@lru_cache(maxsize=64)
def _background_row(background: tuple[int, int, int], width: int) -> Tensor:
    return torch.tensor(background, dtype=torch.uint8).repeat(width)


def _decode(
    data: bytes, header: JpegHeader | None, *, max_pixels: int, reduction_for: Callable[[int, int], int]
) -> NDArray[np.uint8]:
    """Upright RGB ``(H, W, 3)``, C-contiguous; ``reduction_for(width, height)`` says how far a JPEG is shrunk."""
    pixels = None
    orientation = UPRIGHT
    plain = ppm_pixels(data) if header is None else None
    if plain is not None:
        _check_pixels(plain.shape[1], plain.shape[0], max_pixels)
        return plain.copy()
    if header is not None:
        _check_pixels(header.width, header.height, max_pixels)
        pixels = decode_jpeg(data, header, reduction=reduction_for(header.width, header.height))
        orientation = header.orientation
    if pixels is None:
        pixels, orientation = _pillow_decode(data, max_pixels, reduction_for)
    if orientation != UPRIGHT:
        pixels = np.ascontiguousarray(_TURNS[orientation](pixels))
    return pixels


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise SampleError(
            f"picture of {width} x {height} pixels exceeds the limit of {max_pixels}; "
            "shrink it, or raise data.max_image_pixels"
        )


def _pillow_decode(
    data: bytes, max_pixels: int, reduction_for: Callable[[int, int], int]
) -> tuple[NDArray[np.uint8], int]:
    """Pixels as stored, and their EXIF orientation."""
    image, orientation = _pillow_open(data)
    _check_pixels(*image.size, max_pixels)
    kind, size = image.format, image.size
    reduction = reduction_for(*size) if kind in ("JPEG", "MPO") else 1
    try:
        if reduction > 1:
            image.draft(image.mode, (max(1, size[0] // reduction), max(1, size[1] // reduction)))
        image.load()
        return _rgb(image), orientation
    except (SampleError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged bytes
        raise SampleError(f"damaged {kind} picture of {size[0]} x {size[1]} pixels: {_reason(error)}") from error


def _pillow_open(data: bytes) -> tuple[Image.Image, int]:
    """The picture with only its header read, and its EXIF orientation."""
    if not data:
        raise SampleError("empty picture file (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        # Pillow turns TIFF upright by itself.
        exif = b"" if image.format == "TIFF" else image.info.get("exif", b"")
        return image, exif_orientation(exif)
    except UnidentifiedImageError:
        known = ", ".join(_FORMATS)
        raise SampleError(
            f"not a readable picture ({len(data)} bytes starting {data[:8].hex(' ')}); known formats: {known}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged bytes
        raise SampleError(f"unreadable picture header: {_reason(error)}") from error


def _pillow_size(data: bytes) -> tuple[int, int, int]:
    image, orientation = _pillow_open(data)
    return (*image.size, orientation)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in _DEEP_GREY:
        return _deep_grey(np.array(image))
    if image.mode == "F":
        raise SampleError("floating-point picture: its range is unknown; store it as 8 or 16 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _deep_grey(values: NDArray[Any]) -> NDArray[np.uint8]:
    """16-bit grey to 8 bit, rounded: 65535 becomes 255."""
    if values.size and (values.min() < 0 or values.max() > 65_535):
        raise SampleError("32-bit picture with values outside [0, 65535]; store it as 8 or 16 bit")
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
