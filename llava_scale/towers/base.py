"""What a vision tower must offer, and how a tower of your own is found.

A tower of your own is any ``nn.Module`` with the members of ``VisionEncoder``, named in the config as
``vision_tower: package.module:Class`` (constructor arguments in ``vision_tower_kwargs``). The module must be
importable wherever the checkpoint is loaded: checkpoints carry its weights and its name, never its code.

Legend: ``B`` pictures, ``N`` tokens, ``D`` width, ``H``/``W`` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor, nn

from llava_scale.errors import ConfigError

MEMBERS = ("hidden_size", "image_size", "image_mean", "image_std", "grid")


class VisionEncoder(Protocol):
    """The members that a tower given by import path has; its constructor takes keyword arguments."""

    hidden_size: int
    """Width of the features."""
    image_size: int
    """Side in pixels of the square pictures it was made for."""
    image_mean: Sequence[float]
    """Mean of each colour channel, of pixels in [0, 1]."""
    image_std: Sequence[float]
    """Standard deviation of each colour channel, of pixels in [0, 1]."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of features for a picture of ``height`` x ``width`` pixels."""
        ...

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """Features ``(B, rows * columns, D)`` in raster order of normalised float pictures ``(B, 3, H, W)``."""
        ...


class PixelNormalizer(nn.Module):
    """Scales and normalises uint8 pictures where they lie; leaves float pictures as they are.

    Args:
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self._values = (
            tuple(1.0 / (255.0 * deviation) for deviation in std),
            tuple(-centre / deviation for centre, deviation in zip(mean, std, strict=True)),
        )
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.empty(1, len(mean), 1, 1, dtype=torch.float32), persistent=False)
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Write the constants again, for weights that were loaded over empty memory."""
        for buffer, values in zip((self.scale, self.shift), self._values, strict=True):
            if not buffer.is_meta:
                buffer.copy_(torch.tensor(values).view(1, -1, 1, 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PixelNormalizer:
        """Follow the model to its device, but stay float32: sixteen bits would shift every colour."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale, self.shift = self.scale.float(), self.shift.float()
        self.reset_buffers()
        return self

    def forward(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return pictures ``(B, 3, H, W)`` as ``dtype``, ready for the encoder."""
        if pixels.is_floating_point():
            return pixels.to(dtype)
        return pixels.float().mul_(self.scale).add_(self.shift).to(dtype)  # ten times as fast as addcmul of bytes


def remember_constants(module: nn.Module) -> None:
    """Keep a copy of the buffers below ``module`` that no checkpoint holds, for ``restore_constants``."""
    for part in module.modules():
        held = part._non_persistent_buffers_set
        part.constants = {name: value.clone() for name, value in part.named_buffers(recurse=False) if name in held}  # type: ignore[assignment]


@torch.no_grad()
def restore_constants(module: nn.Module) -> None:
    """Write what ``remember_constants`` kept for ``module`` itself over memory that loading left empty."""
    constants: dict[str, Tensor] = module.__dict__.get("constants", {})
    for name, value in constants.items():
        module.get_buffer(name).copy_(value)


def import_encoder(import_path: str, kwargs: dict[str, str | int | float | bool]) -> nn.Module:
    """Build the tower that ``package.module:Class`` names.

    Only classes derived from ``nn.Module`` that have the members of ``VisionEncoder`` are ever called, so a
    checkpoint cannot make this run anything else that happens to be installed.

    Raises:
        ConfigError: the module or class is missing, is no such tower, or refuses ``kwargs``.
    """
    module_name, _, class_name = import_path.partition(":")
    try:
        found = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"vision_tower {import_path!r} cannot be imported ({error}); its module must be installed or on PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, nn.Module) and callable(getattr(found, "grid", None))):
        raise ConfigError(f"vision_tower {import_path!r} must be an nn.Module class with a method grid(height, width)")
    try:
        tower = found(**kwargs)
    except TypeError as error:
        raise ConfigError(f"vision_tower {import_path!r} refuses vision_tower_kwargs {kwargs}: {error}") from None
    missing = [member for member in MEMBERS if not hasattr(tower, member)]
    if missing:
        raise ConfigError(f"vision_tower {import_path!r} lacks {', '.join(missing)}")
    return tower
