"""Train LLaVA-style multimodal language models at scale.

The names below load torch and transformers when they are first used, not before.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODEL_NAMES = (
    "LlavaScaleConfig",
    "LlavaScaleForConditionalGeneration",
    "LlavaScaleProcessor",
    "build_model",
    "load_model",
    "register_auto_classes",
)


def __getattr__(name: str) -> Any:
    """Load the model package for the names that live there."""
    if name not in _MODEL_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("llava_scale.model"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODEL_NAMES])
