"""Another compressor in a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from llava_scale.compressors.custom import find_compressor
from llava_scale.config import to_dict
from llava_scale.errors import ConfigError

if TYPE_CHECKING:
    from llava_scale.config import CompressorConfig
    from llava_scale.model.modeling import LlavaScaleForConditionalGeneration

_FIXED = ("qformer", "stc", "pixel_shuffle", "tome")


def exchange_compressor(model: LlavaScaleForConditionalGeneration, section: CompressorConfig) -> None:
    """Compress in another way from now on, if neither way has weights and the projector's width stays.

    Raises:
        ConfigError: a way with weights, or of another width.
    """
    before, fields = model.config.compressor, to_dict(section)
    if fields == before:
        return
    if _is_fixed(fields) or (before is not None and _is_fixed(before)):
        raise ConfigError(
            f"model.compressor: {fields['type']} cannot take the place of {before and before['type']} in a trained "
            "checkpoint, whose weights belong to it; leave it out, or choose one without weights for both"
        )
    width = model.compressor_width
    if model.set_compressor(section) != width:
        raise ConfigError(
            f"model.compressor: tokens of {fields['type']} have another width than the {width} that this checkpoint's "
            "projector takes"
        )
    model.config.compressor = fields


def _is_fixed(fields: dict[str, Any]) -> bool:
    """Whether a model's weights go with this compressor."""
    if fields["type"] == "custom":
        return issubclass(find_compressor(fields["import_path"]), nn.Module)
    return fields["type"] in _FIXED
