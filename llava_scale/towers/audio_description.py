"""An audio tower as plain fields, which checkpoints keep, and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from llava_scale.errors import ConfigError, suggest
from llava_scale.towers.audio import TransformersAudioTower, TransformersFrontend
from llava_scale.towers.audio_base import AudioFrontend, AudioTower
from llava_scale.towers.audio_families import FAMILIES, model_class
from llava_scale.towers.beats import BeatsTower
from llava_scale.towers.beats_config import BeatsConfig, BeatsFrontend

BEATS = "beats"


def describe_audio_tower(tower: AudioTower) -> dict[str, Any]:
    """What ``build_audio_tower`` needs to build the same tower again: ``family``, ``config`` and settings, JSON-able.

    Raises:
        ConfigError: a tower of no known kind.
    """
    frontend = tower.frontend
    if isinstance(tower, BeatsTower):
        config = asdict(tower.model.config)
        config |= config.pop("extra")
        labels = {str(number): name for number, name in tower.labels.items()}
        return {"family": BEATS, "config": config, "window_seconds": tower.max_seconds, "labels": labels}
    if not isinstance(frontend, TransformersFrontend):
        raise ConfigError(f"{type(tower).__name__} cannot be saved; use a BEATs file or an encoder of transformers")
    return {
        "family": frontend.family,
        "config": json.loads(frontend.config),
        "extractor": json.loads(frontend.extractor),
        "sample_rate": frontend.sample_rate,
        "min_samples": frontend.min_samples,
        "window_seconds": tower.max_seconds,
    }


def build_audio_tower(fields: dict[str, Any]) -> AudioTower:
    """The tower that ``describe_audio_tower`` described, with fresh weights.

    Raises:
        ConfigError: a family that is not known.
    """
    family, window_seconds = fields["family"], fields["window_seconds"]
    if family == BEATS:
        labels = {int(number): name for number, name in fields["labels"].items()}
        config = BeatsConfig.from_dict(fields["config"])
        return BeatsTower(config, window_seconds=window_seconds, labels=labels)
    config = model_class(FAMILIES[_known(family)]).config_class.from_dict(fields["config"])
    return TransformersAudioTower(config, extractor=fields["extractor"], window_seconds=window_seconds)


def build_audio_frontend(fields: dict[str, Any]) -> AudioFrontend:
    """The front end of that tower, without building the tower.

    Raises:
        ConfigError: a family that is not known.
    """
    if fields["family"] == BEATS:
        return BeatsFrontend(round(fields["window_seconds"] * 16_000), fields["config"]["input_patch_size"])
    return TransformersFrontend(
        _known(fields["family"]),
        fields["sample_rate"],
        int(fields["window_seconds"] * fields["sample_rate"]),
        fields["min_samples"],
        json.dumps(fields["config"], sort_keys=True, default=str),
        json.dumps(fields["extractor"], sort_keys=True, default=str),
    )


def _known(family: str) -> str:
    if family not in FAMILIES:
        raise ConfigError(f"no audio tower of family {family!r}; {suggest(family, FAMILIES)}")
    return family
