"""From sounds to the tokens that are spliced into the text: audio tower, compressor, projector.

Legend: ``A`` sounds, ``N`` features of a sound, ``M`` tokens of a sound, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_scale.compressors import (
    Compressor,
    Context,
    CustomCompressor,
    Projector,
    build_projector,
    build_qformer,
    build_weightless,
    parse_compressor,
    token_count,
)
from llava_scale.config.compressor import CustomConfig, QFormerConfig
from llava_scale.errors import ConfigError, ShapeError
from llava_scale.towers.audio_base import AudioTower
from llava_scale.towers.audio_description import build_audio_tower
from llava_scale.towers.base import remember_constants
from llava_scale.types import AudioFeatures, Grid

if TYPE_CHECKING:
    from llava_scale.compressors import TokenCount
    from llava_scale.config import CompressorConfig


class AudioPath:
    """The part of the model that hears; mixed into it, so that parameters keep their short names.

    Attributes:
        audio_tower: Windows of sound to features; None in a model that does not hear.
        audio_compressor: Features to fewer tokens; None where all stay.
        audio_projector: Into the language model's width.
    """

    config: Any
    audio_tower: AudioTower | None
    audio_compressor: Compressor | None
    audio_projector: Projector | None

    def set_audio(self, tower: AudioTower | None = None) -> None:
        """Put in what ``config.audio`` describes; ``tower`` has weights already.

        Raises:
            ConfigError: a compressor that does not fit sounds.
        """
        self.audio_tower = self.audio_compressor = self.audio_projector = None
        if self.config.audio is None:
            return
        self.audio_tower = tower if tower is not None else build_audio_tower(self.config.audio["tower"])
        width = self.audio_tower.hidden_size
        section = audio_section(self.config.audio)
        text_width = self.config.text_config.hidden_size
        if section is not None:
            self.audio_compressor = _compressor(section, width, text_width)
            width = self.audio_compressor.out_width(width)
        projector = self.config.audio["projector"]
        self.audio_projector = build_projector(projector["type"], width, text_width, input_norm=projector["input_norm"])

    def get_audio_features(
        self,
        audio_values: Tensor,
        audio_lengths: Tensor,
        audio_grids: Sequence[Grid] | None = None,
        *,
        step: int | None = None,
    ) -> list[Tensor]:
        """Tokens ``(M, D)`` of each sound, in the language model's width.

        Args:
            audio_values: Windows of all sounds, in order (``AudioFeatures.values``).
            audio_lengths: Samples in each window.
            audio_grids: ``(1, 1, features)`` of each sound; None for one sound of all windows.
            step: Optimizer step of schedules; None at evaluation.

        Raises:
            ShapeError: no audio tower, or grids that do not add up to the features there are.
        """
        if self.audio_tower is None or self.audio_projector is None:
            raise ShapeError("this model does not hear: it was built without model.audio_tower")
        with _no_graph(self.audio_tower):
            features = self.audio_tower.encode(AudioFeatures(audio_values, audio_lengths.to(audio_values.device)))
        return self.sound_tokens(features, audio_grids, step=step)

    def sound_tokens(
        self, features: Tensor, audio_grids: Sequence[Grid] | None = None, *, step: int | None = None
    ) -> list[Tensor]:
        """Tokens ``(M, D)`` of each sound, from features ``(sum of features, D)`` of the tower.

        Raises:
            ShapeError: as ``get_audio_features``.
        """
        if self.audio_projector is None:
            raise ShapeError("this model does not hear: it was built without model.audio_tower")
        features = as_given(features, self.audio_projector)
        lengths = [len(features)] if audio_grids is None else [grid[2] for grid in audio_grids]
        if sum(lengths) != len(features):
            raise ShapeError(
                f"{len(lengths)} sounds of {sum(lengths)} features were announced, but their windows make "
                f"{len(features)}"
            )
        if self.audio_compressor is None:
            return list(torch.split(self.audio_projector(features), lengths))
        sounds = torch.split(features, lengths)
        tokens: dict[int, Tensor] = {}
        for length in sorted(set(lengths)):  # sounds of the same length together
            numbers = [number for number, other in enumerate(lengths) if other == length]
            same = torch.stack([sounds[number] for number in numbers])
            compressed = self.audio_compressor(same, (1, 1, length), Context(step=step)).tokens
            tokens.update(zip(numbers, self.audio_projector(compressed), strict=True))
        return [tokens[number] for number in range(len(lengths))]

    def num_audio_tokens(self, grid: Grid, *, step: int | None = None) -> int:
        """Tokens in the text of a sound whose features lie on ``grid``."""
        count = audio_token_count(self.config.audio)
        return grid[2] if count is None else count.num_tokens(grid, step)

    def audio_parameters(self) -> list[nn.Parameter]:
        """All parameters that only sounds use."""
        modules: list[Any] = [self.audio_tower, self.audio_compressor, self.audio_projector]
        return [parameter for module in modules if isinstance(module, nn.Module) for parameter in module.parameters()]


def audio_section(audio: dict[str, Any] | None) -> CompressorConfig | None:
    """The audio compressor's section in the ``audio`` field of a checkpoint's config."""
    return None if audio is None or audio["compressor"] is None else parse_compressor(audio["compressor"])


def audio_token_count(audio: dict[str, Any] | None) -> TokenCount | None:
    """How many tokens the audio compressor leaves; None where there is none."""
    section = audio_section(audio)
    return None if section is None else token_count(section, num_blocks=0)


def _compressor(section: CompressorConfig, in_width: int, text_width: int) -> Compressor:
    found: Compressor | None
    if getattr(section, "instruction_tower", ""):
        raise ConfigError("model.audio_compressor.instruction_tower: sounds are read without a question; set it to ''")
    if isinstance(section, QFormerConfig):
        found = build_qformer(section, in_width=in_width, text_width=text_width, instruction_width=0)
    elif isinstance(section, CustomConfig):
        found = CustomCompressor(section, in_width=in_width)
        remember_constants(found)
    else:
        found = build_weightless(section)
    if found is None or found.needs_signals or getattr(section, "after_projector", False):
        raise ConfigError(
            f"model.audio_compressor: {section.type} (or its options) needs a vision tower; for sounds choose pool, "
            "token_merging, random_prune, uniform_prune, divprune, qformer or custom, before the projector"
        )
    return found


def as_given(features: Tensor, reader: nn.Module) -> Tensor:
    """Features that were computed ahead, in the type of the module that reads them; autocast chooses by itself."""
    if torch.is_autocast_enabled(features.device.type):
        return features
    return features.to(next((value.dtype for value in reader.parameters()), features.dtype))


def _no_graph(module: nn.Module) -> AbstractContextManager[Any]:
    trains = any(parameter.requires_grad for parameter in module.parameters())
    return nullcontext() if trains else torch.no_grad()
