"""Vision models from the hub or a folder: the vision part of whatever lies there, with its picture statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as hub_logging

from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.towers.vision import TransformersVisionTower, as_tokens

ImageStats = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each colour channel, of pixels in [0, 1]."""

OPENAI: ImageStats = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET: ImageStats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: ImageStats = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

FAMILY_STATS: dict[str, ImageStats] = {
    "siglip": HALF,
    "siglip2": HALF,
    "vit": HALF,
    "deit": IMAGENET,
    "beit": HALF,
    "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET,
    "dinov3_vit": IMAGENET,
    "convnext": IMAGENET,
    "convnextv2": IMAGENET,
    "resnet": IMAGENET,
    "efficientnet": IMAGENET,
    "swin": IMAGENET,
}
"""Statistics of families whose checkpoints come without a preprocessor config; all others use OpenAI CLIP's."""


def vision_config_of(name: str) -> PreTrainedConfig:
    """Config of the vision model in ``name``; of the vision part, if a text model lies beside it.

    Raises:
        ConfigError: nothing of transformers lies there.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.vision_tower {name!r} cannot be read: {error}") from None
    return getattr(config, "vision_config", config)


def load_vision_model(name: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Load the vision model of ``name`` with all of its weights.

    Raises:
        CheckpointError: weights of the vision model are missing.
    """
    with quiet_loading():
        model, report = AutoModel.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True)
    # Poolers are not used; some checkpoints come without one.
    missing = [key for key in (*report["missing_keys"], *report["mismatched_keys"]) if "pooler" not in str(key)]
    if missing:
        raise CheckpointError(f"{name} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]!r}")
    return model


def read_image_stats(name: str, config: PreTrainedConfig) -> ImageStats:
    """Mean and standard deviation that the checkpoint was trained with, else those of its family."""
    for filename, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = cached_file(
            name,
            filename,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        fields: dict[str, Any] = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
        fields = fields.get(section, {}) if section else fields
        if "image_mean" in fields and "image_std" in fields:
            return tuple(fields["image_mean"]), tuple(fields["image_std"])
    return FAMILY_STATS.get(config.model_type.removesuffix("_vision_model"), OPENAI)


@torch.no_grad()
def whole_features(model: PreTrainedModel, feature_layer: int, image_size: int) -> Tensor | None:
    """``hidden_states[feature_layer]`` of the whole model for a fixed picture; None where it returns none.

    Taken before a tower is cut, to compare with afterwards (``check_cut``).
    """
    shown = model.eval()(
        pixel_values=_test_picture(image_size, model.dtype),
        output_hidden_states=True,
        **TransformersVisionTower.size_kwargs(model, image_size),
    )
    states = getattr(shown, "hidden_states", None)
    return as_tokens(states[feature_layer]) if states else None


@torch.no_grad()
def check_cut(tower: TransformersVisionTower, expected: Tensor | None) -> None:
    """Make sure that cutting did not change the features.

    Raises:
        ConfigError: the cut tower gives other features than the whole model did.
    """
    features = tower.encode(_test_picture(tower.image_size, tower.model.dtype))
    if expected is not None and not torch.allclose(features, expected, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"{type(tower.model).__name__} cannot be cut at this model.vision_feature_layer without changing its "
            "features; set it to -1, or give the tower by import path"
        )


def _test_picture(image_size: int, dtype: torch.dtype) -> Tensor:
    ramp = torch.linspace(-1.0, 1.0, 3 * image_size * image_size)
    return torch.sin(50.0 * ramp).view(1, 3, image_size, image_size).to(dtype)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hold back transformers' report of weights that belong to the text part of a checkpoint."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)
