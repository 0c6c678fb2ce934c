"""One encoder per modality, behind one interface."""

from __future__ import annotations

from llava_scale.towers.base import PixelNormalizer, VisionEncoder, import_encoder, restore_constants
from llava_scale.towers.vision import CustomVisionTower, TransformersVisionTower, VisionTower

__all__ = [
    "VISION_TOWERS",
    "CustomVisionTower",
    "PixelNormalizer",
    "TransformersVisionTower",
    "VisionEncoder",
    "VisionTower",
    "import_encoder",
    "restore_constants",
]

VISION_TOWERS: dict[str, type[VisionTower]] = {
    "transformers": TransformersVisionTower,
    "custom": CustomVisionTower,
}
"""Vision towers by where they come from."""
