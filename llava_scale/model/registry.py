"""Makes the model known to transformers, so that its Auto classes and ``pipeline`` find it."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from llava_scale.model.attention import register
from llava_scale.model.configuration import CustomVisionConfig, LlavaScaleConfig
from llava_scale.model.modeling import LlavaScaleForConditionalGeneration
from llava_scale.model.processing import LlavaScaleProcessor


def register_auto_classes() -> None:
    """Register config, model, processor and packed attention; doing it again changes nothing."""
    register()
    AutoConfig.register(LlavaScaleConfig.model_type, LlavaScaleConfig, exist_ok=True)
    AutoConfig.register(CustomVisionConfig.model_type, CustomVisionConfig, exist_ok=True)
    AutoModelForImageTextToText.register(LlavaScaleConfig, LlavaScaleForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LlavaScaleConfig, LlavaScaleProcessor, exist_ok=True)
