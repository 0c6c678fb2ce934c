"""Audio encoders of transformers as audio towers, and the one place that knows all audio towers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoFeatureExtractor, PreTrainedConfig

from llava_scale.errors import CheckpointError, ConfigError, ShapeError, suggest
from llava_scale.towers.audio_base import AudioFrontend, AudioTower, join_features, tokens_valid
from llava_scale.towers.audio_families import FAMILIES, Family, build, model_class
from llava_scale.towers.beats_checkpoint import load_beats
from llava_scale.types import AudioFeatures

__all__ = [
    "AudioFeatures",
    "AudioFrontend",
    "AudioTower",
    "TransformersAudioTower",
    "TransformersFrontend",
    "join_features",
    "load_audio_tower",
]

_AUDIO_PARTS = ("audio_config", "encoder_config", "thinker_config")
"""Where a model that holds more than an audio encoder keeps its config, outermost first."""

_UNUSED = ("masked_spec_embed", "pooler")
"""Weights that checkpoints may lack: only pre-training or other outputs need them."""


@dataclass(frozen=True, slots=True)
class TransformersFrontend(AudioFrontend):
    """Sound to the features that transformers' feature extractor of a family makes.

    Attributes:
        family: Row of ``audio_families.FAMILIES``.
        sample_rate: Samples a second.
        window_samples: Samples of the longest window.
        min_samples: Samples of the shortest window.
        config: The encoder's config, as JSON.
        extractor: The feature extractor's settings, as JSON.
    """

    family: str
    sample_rate: int
    window_samples: int
    min_samples: int
    config: str
    extractor: str

    def features(self, wave: Tensor) -> Tensor:
        """Features ``(T, ...)`` of one window."""
        return FAMILIES[self.family].features(_extractor(self.family, self.extractor), wave)

    def window_tokens(self, lengths: Tensor) -> Tensor:
        """Tokens of windows, by the family's formula."""
        return FAMILIES[self.family].tokens(_settings(self.config), lengths)

    def fingerprint(self) -> str:
        """Settings of windows, extractor and encoder."""
        return repr(self)


class TransformersAudioTower(AudioTower):
    """An audio encoder of transformers; its last hidden states are the features.

    Args:
        config: The encoder's own config (not that of a model around it).
        extractor: Settings of its feature extractor; none takes the family's.
        window_seconds: Longest window; 0 takes the family's. Encoders of fixed windows take no other.

    Raises:
        ConfigError: an encoder of no known family.
    """

    def __init__(
        self, config: PreTrainedConfig, *, extractor: dict[str, Any] | None = None, window_seconds: float = 0.0
    ) -> None:
        super().__init__()
        family = family_of(config)
        if getattr(config, "apply_spec_augment", False):
            config.apply_spec_augment = False  # hides parts of the sound, which the answer may hang on
        if getattr(config, "add_adapter", False):
            raise ConfigError(f"{config.model_type} with add_adapter is not supported; set it to false")
        settings = config.to_dict()
        settings_json = json.dumps(settings, sort_keys=True, default=str)
        extractor_json = json.dumps(extractor or family.defaults(settings), sort_keys=True, default=str)
        rate = int(_extractor(config.model_type, extractor_json).sampling_rate)
        self.frontend = TransformersFrontend(
            config.model_type,
            rate,
            int(min(window_seconds or family.seconds, family.seconds) * rate),
            family.min_samples(settings),
            settings_json,
            extractor_json,
        )
        self.hidden_size = family.width(settings)
        self.model = build(family, config)
        self._family = family

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features and which are real.

        Raises:
            ShapeError: the encoder returned fewer features than its formula promises.
        """
        tokens = self.frontend.window_tokens(lengths)
        x = self._family.run(self.model, values, lengths, tokens)
        valid = tokens_valid(tokens, x.shape[1])
        if x.ndim != 3 or x.shape[-1] != self.hidden_size or x.shape[1] < int(tokens.max()):
            raise ShapeError(f"{type(self.model).__name__} returned {tuple(x.shape)} for {tokens.tolist()} tokens")
        return x, valid


def family_of(config: PreTrainedConfig) -> Family:
    """The family of an encoder's config.

    Raises:
        ConfigError: none is known.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(f"no audio tower for {config.model_type!r}; {suggest(config.model_type, FAMILIES)}")
    return family


def load_audio_tower(name: str, *, window_seconds: float = 0.0, dtype: torch.dtype = torch.float32) -> AudioTower:
    """Load an audio tower in evaluation mode.

    Args:
        name: An official BEATs file (``.pt``), or hub name or folder of a model of transformers that is or holds an
            audio encoder; of a larger model only the encoder's weights are read.
        window_seconds: Longest window; 0 takes what the encoder was trained on.
        dtype: Of the weights.

    Raises:
        ConfigError: nothing of a known family lies there.
        CheckpointError: weights are missing, or the file is damaged.
    """
    if name.endswith(".pt"):
        return load_beats(name, window_seconds=window_seconds or 10.0, dtype=dtype)
    config = audio_config_of(name)
    family = family_of(config)
    tower = TransformersAudioTower(config, extractor=_extractor_settings(name), window_seconds=window_seconds)
    mapping = {family.part: ""} if family.part else None
    model, report = model_class(family).from_pretrained(
        name, config=config, dtype=dtype, key_mapping=mapping, output_loading_info=True
    )
    missing = [str(key) for key in report["missing_keys"] if not any(part in str(key) for part in _UNUSED)]
    missing += [str(key[0]) for key in report["mismatched_keys"]]
    if missing:
        raise CheckpointError(f"{name} lacks {len(missing)} weights of {family.model}, first {missing[0]!r}")
    tower.model = model
    return tower.eval()


def audio_config_of(name: str) -> PreTrainedConfig:
    """Config of the audio encoder in ``name``; of the part, if it is one of a larger model.

    Raises:
        ConfigError: nothing of transformers lies there.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"audio tower {name!r} cannot be read: {error}") from None
    while config.model_type not in FAMILIES:
        inner = next((getattr(config, part) for part in _AUDIO_PARTS if getattr(config, part, None) is not None), None)
        if inner is None:
            break
        config = inner
    return config


def _extractor_settings(name: str) -> dict[str, Any] | None:
    """Settings that lie beside the weights, if any."""
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in _EXTRACTOR_FILES):
        return None
    try:
        return dict(AutoFeatureExtractor.from_pretrained(name).to_dict())
    except (OSError, ValueError):
        return None


_EXTRACTOR_FILES = ("preprocessor_config.json", "processor_config.json")


@lru_cache(maxsize=16)
def _settings(config: str) -> dict[str, Any]:
    return dict(json.loads(config))


@lru_cache(maxsize=16)
def _extractor(family: str, settings: str) -> Any:
    return getattr(transformers, FAMILIES[family].extractor)(**json.loads(settings))
