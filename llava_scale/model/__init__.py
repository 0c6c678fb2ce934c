"""Towers, compressors and language model in one differentiable whole, Hugging Face native.

Importing this package registers the model with transformers' Auto classes and the packed attention with its
attention interface.
"""

from __future__ import annotations

from llava_scale.model.attention import PACKED, PackedLayout
from llava_scale.model.build import BuiltModel, build_model, load_model
from llava_scale.model.configuration import CustomVisionConfig, LlavaScaleConfig
from llava_scale.model.modeling import LlavaScaleForConditionalGeneration, LlavaScaleOutput
from llava_scale.model.processing import LlavaScaleProcessor
from llava_scale.model.registry import register_auto_classes
from llava_scale.model.rows import row_inputs
from llava_scale.model.tokens import MediaCounter

__all__ = [
    "PACKED",
    "BuiltModel",
    "CustomVisionConfig",
    "LlavaScaleConfig",
    "LlavaScaleForConditionalGeneration",
    "LlavaScaleOutput",
    "LlavaScaleProcessor",
    "MediaCounter",
    "PackedLayout",
    "build_model",
    "load_model",
    "register_auto_classes",
    "row_inputs",
]

register_auto_classes()
