"""The hearing part of a model from its config, for new models and for checkpoints that have none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_scale.config import to_dict
from llava_scale.config.compressor import PoolConfig
from llava_scale.errors import ConfigError
from llava_scale.model.presets import TINY_AUDIO_POOL, tiny_audio_tower
from llava_scale.towers.audio import load_audio_tower
from llava_scale.towers.audio_description import describe_audio_tower

if TYPE_CHECKING:
    from llava_scale.config import ModelConfig
    from llava_scale.model.configuration import LlavaScaleConfig
    from llava_scale.model.modeling import LlavaScaleForConditionalGeneration
    from llava_scale.towers.audio_base import AudioTower

TINY_AUDIO = "tiny"
"""Name of the small random audio tower."""

_CALIBRATION_S = 2.0


def audio_tower_of(config: ModelConfig, full: LlavaScaleConfig, dtype: torch.dtype) -> AudioTower | None:
    """The audio tower that ``config`` names, with weights, or None; ``full.audio`` then describes the hearing part.

    Raises:
        ConfigError: no such tower.
        CheckpointError: its weights are not complete.
    """
    if not config.audio_tower:
        return None
    section = config.audio_compressor
    tower: AudioTower
    if config.audio_tower == TINY_AUDIO:
        if config.audio_window_seconds:
            raise ConfigError("model.audio_window_seconds has no effect on the tiny audio tower; leave it out")
        tower = tiny_audio_tower().to(dtype)
        if section is None:
            section = PoolConfig(type="pool", window=(1, 1, TINY_AUDIO_POOL))
    else:
        tower = load_audio_tower(config.audio_tower, window_seconds=config.audio_window_seconds, dtype=dtype)
    full.audio = {
        "tower": describe_audio_tower(tower),
        "projector": {"type": config.audio_projector.type, "input_norm": config.audio_projector.input_norm},
        "compressor": None if section is None else to_dict(section),
    }
    return tower


def give_hearing(model: LlavaScaleForConditionalGeneration, config: ModelConfig, dtype: torch.dtype) -> None:
    """Add the audio tower that ``config`` names, with a fresh projector, to a model that has none.

    Raises:
        ConfigError: the model hears already, or no such tower.
    """
    if model.config.audio is not None:
        raise ConfigError("model.audio_tower: the checkpoint of model.init_from has an audio tower; leave it out")
    tower = audio_tower_of(config, model.config, dtype)
    model.set_audio(tower)
    for part in (model.audio_compressor, model.audio_projector):
        if isinstance(part, nn.Module):
            part.apply(model._init_weights)
            part.to(dtype)


@torch.no_grad()
def match_audio_scale(model: LlavaScaleForConditionalGeneration, *, seed: int) -> None:
    """Scale the audio projector so that sound tokens start at the root mean square of the text embeddings.

    Measured on a noise whose loudness changes.

    Raises:
        ConfigError: the projector has no layer to scale.
    """
    assert model.audio_tower is not None
    assert model.audio_projector is not None
    frontend = model.audio_tower.frontend
    number = int(_CALIBRATION_S * frontend.sample_rate)
    noise = torch.randn(number, generator=torch.Generator().manual_seed(seed))
    found = frontend(0.1 * noise * torch.linspace(0, 1, number))
    (tokens,) = model.get_audio_features(found.values.to(model.device), found.lengths)
    token_ids = torch.arange(model.config.text_config.vocab_size, device=model.device)
    model.audio_projector.scale_output(float(_rms(model.get_input_embeddings()(token_ids)) / _rms(tokens)))


def _rms(values: Tensor) -> Tensor:
    return values.float().pow(2).mean().sqrt()


def parts_with_weights(*modules: nn.Module | None) -> list[Any]:
    """Those that are there."""
    return [module for module in modules if module is not None]
