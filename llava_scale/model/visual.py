"""From pixels to the tokens that are spliced into the text: tower, compressor, projector.

Legend: ``V`` media of one kind and grid, ``T`` frames of each, ``N`` features of a frame, ``M`` tokens of a medium,
``D`` width, ``L`` tokens of a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_scale.compressors import (
    CompressedTokens,
    Compressor,
    Context,
    CustomCompressor,
    Instruction,
    Projector,
    SignalTap,
    TokenCount,
    TomeCount,
    TomeInBlocks,
    TowerSignals,
    build_qformer,
    build_stc,
    build_weightless,
    parse_compressor,
    token_count,
)
from llava_scale.config.compressor import CustomConfig, PoolConfig, QFormerConfig, RatioConfig, StcConfig, TomeConfig
from llava_scale.errors import ConfigError, ShapeError
from llava_scale.model.audible import as_given
from llava_scale.towers import VisionTower
from llava_scale.towers.base import remember_constants
from llava_scale.towers.instruction import InstructionTower
from llava_scale.types import AudioFeatures, Grid

if TYPE_CHECKING:
    from llava_scale.config import CompressorConfig
    from llava_scale.towers.instruction import Encoded


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaInputs:
    """Pictures, videos and sounds of a batch.

    Attributes:
        pictures: ``(I, 3, H, W)``, or features ``(I, N, D)`` of the frozen tower, or None.
        frames: ``(F, 3, H, W)`` frames of all videos, or their features ``(F, N, D)``, or None.
        video_grids: Grid of each video; None for one video of all frames.
        sounds: Windows of all sounds, or features ``(sum of features, D)`` of the frozen tower, or None.
        audio_grids: Grid of each sound; None for one sound of all windows.
        step: Optimizer step of schedules; None at evaluation.
        questions: Token ids and mask ``(I + videos + sounds, L)``, in this order; None for none.
    """

    pictures: Tensor | None = None
    frames: Tensor | None = None
    video_grids: Sequence[Grid] | None = None
    sounds: AudioFeatures | Tensor | None = None
    audio_grids: Sequence[Grid] | None = None
    step: int | None = None
    questions: Encoded | None = None


class VisualPath:
    """The part of the model before the splice; mixed into it, so that parameters keep their short names.

    Attributes:
        vision_tower: Pixels to features.
        compressor: Features to fewer tokens, before or after the projector; None where there is none, or where it is
            inside the tower.
        tome: Merging inside the tower; None where there is none.
        projector: Into the language model's width.
        instruction_tower: Reads questions; None where no compressor asks for it.
    """

    config: Any
    vision_tower: VisionTower
    compressor: Compressor | None
    projector: Projector
    instruction_tower: InstructionTower | None
    tome: TomeInBlocks | None

    def set_compressor(self, section: CompressorConfig | None) -> int:
        """Put the compressor that ``section`` describes into its place; return the width that the projector gets.

        Raises:
            ConfigError: it does not fit the tower.
        """
        tower, self._section = self.vision_tower, section
        self.compressor = self.tome = self._tap = None
        self._count: TokenCount | None = None
        in_width = tower.hidden_size
        if section is None:
            return in_width
        if tower.feature_select == "full" and tower.num_prefix_tokens:
            raise ConfigError("a compressor needs tokens on a grid: set model.vision_feature_select=patch")
        if isinstance(section, TomeConfig):
            self.tome = TomeInBlocks(tower, tower.num_prefix_tokens)
        elif isinstance(section, QFormerConfig):
            self.compressor = build_qformer(
                section,
                in_width=in_width,
                text_width=self.config.text_config.hidden_size,
                instruction_width=self.instruction_tower.hidden_size if self.instruction_tower else 0,
            )
        elif isinstance(section, StcConfig):
            self.compressor = build_stc(section, in_width=in_width, text_width=self.config.text_config.hidden_size)
        elif isinstance(section, CustomConfig):
            self.compressor = self._custom(section, in_width)
        else:
            self.compressor = build_weightless(section)
        if self.compressor is not None and self.compressor.needs_signals:
            self._tap = SignalTap(tower, tower.num_prefix_tokens)
        self._count = token_count(section, num_blocks=self.tome.num_blocks if self.tome else 0)
        return self.compressor_width

    @property
    def compressor_width(self) -> int:
        """Width of the tokens that the projector gets."""
        width = self.vision_tower.hidden_size
        return self.compressor.out_width(width) if self.compressor and not self._after_projector else width

    def _custom(self, section: CustomConfig, in_width: int) -> CustomCompressor:
        text_width: int = self.config.text_config.hidden_size
        made = CustomCompressor(
            section,
            in_width=text_width if section.after_projector else in_width,
            instruction_width=self.instruction_tower.hidden_size if self.instruction_tower else 0,
        )
        remember_constants(made)
        if section.after_projector and made.out_width(text_width) != text_width:
            raise ConfigError(
                f"model.compressor: {made.name} makes tokens of width {made.out_width(text_width)} from projected ones "
                f"of {text_width}; leave out after_projector"
            )
        return made

    def set_ratio(self, ratio: float) -> None:
        """Remove another share of the tokens from now on, in compressors that remove one.

        Raises:
            ConfigError: the compressor has no ratio, or this is none.
        """
        section = self._section
        if not isinstance(section, RatioConfig):
            raise ConfigError("this model's compressor removes no share of the tokens that could be changed")
        if not 0 <= ratio < 1:
            raise ConfigError(f"the ratio must be in [0, 1), got {ratio}")
        self._section = changed = replace(section, ratio=ratio)
        if self.compressor is not None:
            self.compressor = build_weightless(changed)
        self._count = token_count(changed, num_blocks=self.tome.num_blocks if self.tome else 0)
        self.config.compressor = {**self.config.compressor, "ratio": ratio}

    def num_visual_tokens(self, num_frames: int = 1, *, step: int | None = None) -> int:
        """Tokens of a picture, or of a video of ``num_frames``, in the text."""
        if self._count is None:
            return num_frames * self.vision_tower.num_tokens
        return self._count.num_tokens((num_frames, *self._frame_grid), step)

    def get_image_features(
        self, pixel_values: Tensor, *, step: int | None = None, questions: Encoded | None = None
    ) -> Tensor:
        """Tokens ``(I, M, D)`` of pictures ``(I, 3, H, W)``, in the language model's width.

        Args:
            pixel_values: uint8, or float if normalised.
            step: Optimizer step; None at evaluation.
            questions: Token ids and mask ``(I, L)``, for compressors that read them.
        """
        return self.visual_tokens(pixel_values, 1, step=step, instruction=self._read(questions)).tokens

    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        video_grids: Sequence[Grid] | None = None,
        *,
        step: int | None = None,
        questions: Encoded | None = None,
    ) -> list[Tensor]:
        """Tokens ``(M, D)`` of each video.

        Args:
            pixel_values_videos: ``(F, 3, H, W)`` frames of all videos.
            video_grids: Grid of each video; None for one video of all frames.
            step: Optimizer step; None at evaluation.
            questions: Token ids and mask ``(videos, L)``.

        Raises:
            ShapeError: the grids do not have as many frames as there are.
        """
        lengths = [len(pixel_values_videos)] if video_grids is None else [grid[0] for grid in video_grids]
        if sum(lengths) != len(pixel_values_videos):
            raise ShapeError(f"{len(lengths)} videos of {sum(lengths)} frames were announced, "
                             f"got {len(pixel_values_videos)} frames")  # fmt: skip
        instruction, videos = self._read(questions), torch.split(pixel_values_videos, lengths)
        tokens: dict[int, Tensor] = {}
        for length in sorted(set(lengths)):  # videos of the same length together
            numbers = [number for number, other in enumerate(lengths) if other == length]
            asked = instruction and Instruction(*(value[numbers] for value in instruction))
            frames = torch.cat([videos[number] for number in numbers])
            compressed = self.visual_tokens(frames, length, step=step, instruction=asked)
            tokens.update(zip(numbers, compressed.tokens, strict=True))
        return [tokens[number] for number in range(len(lengths))]

    def visual_tokens(
        self, pixels: Tensor, num_frames: int, *, step: int | None = None, instruction: Instruction | None = None
    ) -> CompressedTokens:
        """Projected tokens ``(V, M, D)`` of media of ``num_frames`` frames each, with the places they stand for."""
        features, signals = self._features(pixels, num_frames, step)
        if self._after_projector:
            features = features._replace(tokens=self.projector(features.tokens))
        if self.compressor is not None:
            context = Context(step=step, instruction=instruction, signals=signals)
            features = self.compressor(features.tokens, (num_frames, *self._frame_grid), context)
        if not self._after_projector:
            features = features._replace(tokens=self.projector(features.tokens))
        return features

    def visual_embeddings(self, inputs: MediaInputs) -> tuple[Tensor | None, Tensor | None]:
        """Tokens of the pictures ``(I, M, D)`` and of all videos ``(sum of M, D)``; None where there are none."""
        images = videos = None
        num_pictures = 0 if inputs.pictures is None else len(inputs.pictures)
        of_pictures, of_videos = _split(inputs.questions, num_pictures)
        if inputs.pictures is not None:
            images = self.get_image_features(inputs.pictures, step=inputs.step, questions=of_pictures)
        if inputs.frames is not None:
            grids = inputs.video_grids or None
            of_videos = of_videos and _first(of_videos, 1 if grids is None else len(grids))
            videos = torch.cat(self.get_video_features(inputs.frames, grids, step=inputs.step, questions=of_videos))
        return images, videos

    def unused_parameters(self, inputs: MediaInputs) -> list[nn.Parameter]:
        """Parameters before the splice that a pass over ``inputs`` does not touch."""
        used = inputs.pictures is not None or inputs.frames is not None
        modules: list[Any] = [] if used else [self.vision_tower, self.compressor, self.projector]
        if not used or inputs.questions is None:
            modules.append(self.instruction_tower)
        return [parameter for module in modules if isinstance(module, nn.Module) for parameter in module.parameters()]

    @property
    def _after_projector(self) -> bool:
        return isinstance(self._section, RatioConfig | PoolConfig | CustomConfig) and self._section.after_projector

    @property
    def _frame_grid(self) -> tuple[int, int]:
        return self.vision_tower.grid(self.vision_tower.image_size, self.vision_tower.image_size)

    def _features(
        self, pixels: Tensor, num_frames: int, step: int | None
    ) -> tuple[CompressedTokens, TowerSignals | None]:
        """Features of each medium, its frames behind each other, and what the tower's attention tells."""
        with _no_graph(self.vision_tower):
            features, signals = self._run_tower(pixels, step)
        per_frame = features.group.shape[1] if features.group is not None else features.tokens.shape[1]
        frame = torch.arange(num_frames, device=pixels.device).repeat(len(pixels) // num_frames)[:, None]
        placed = features._replace(positions=features.positions + frame * per_frame)
        if features.group is not None:
            placed = placed._replace(group=features.group + frame * features.tokens.shape[1])
        joined = [None if part is None else _join(part, num_frames) for part in placed]
        return CompressedTokens(*joined), signals and TowerSignals(*(_join(part, num_frames) for part in signals))  # type: ignore[arg-type]

    def _run_tower(self, pixels: Tensor, step: int | None) -> tuple[CompressedTokens, TowerSignals | None]:
        """Features of each frame, so many frames at once as the config allows.

        Where the tower trains, what it holds for the backward pass is bounded in the same way: each part is computed
        again then.
        """
        if pixels.ndim == 3:
            return _placed(self._given_features(pixels)), None
        size = self.config.video.get("frames_at_once", 0) or len(pixels)
        parts = [self._run_part(part, step) for part in torch.split(pixels, size)]
        if len(parts) == 1:
            return parts[0]
        joined = [_rows(of_parts) for of_parts in zip(*(found for found, _ in parts), strict=True)]
        features = CompressedTokens(*joined)  # type: ignore[arg-type]
        if parts[0][1] is None:
            return features, None
        signals = zip(*(found for _, found in parts if found is not None), strict=True)
        return features, TowerSignals(*(torch.cat(of_parts) for of_parts in signals))

    def _run_part(self, pixels: Tensor, step: int | None) -> tuple[CompressedTokens, TowerSignals | None]:
        """Features of frames that the tower gets together."""
        if self.tome is not None:
            assert isinstance(self._count, TomeCount)
            rows, cols = self._frame_grid
            with self.tome.merging(self._count.removals(rows * cols, step)):
                return self.tome.result(self.vision_tower(pixels)), None
        if self._tap is None and self.config.video.get("frames_at_once", 0) and torch.is_grad_enabled():
            return _placed(checkpoint(self.vision_tower, pixels, use_reentrant=False)), None
        return _placed(self.vision_tower(pixels)), self._tap.signals() if self._tap else None

    def _given_features(self, features: Tensor) -> Tensor:
        """Features that were computed ahead, in the type of this model.

        Raises:
            ShapeError: not this tower's.
            ConfigError: the compressor works inside the tower.
        """
        tower = self.vision_tower
        if features.shape[1:] != (tower.num_tokens, tower.hidden_size):
            raise ShapeError(
                f"features computed ahead must be (pictures, {tower.num_tokens}, {tower.hidden_size}), "
                f"got {tuple(features.shape)}"
            )
        if not self.takes_features:
            raise ConfigError(
                f"the compressor {self._section.type if self._section else ''!r} looks inside the vision tower and "
                "cannot work on features computed ahead: leave data.features out"
            )
        return as_given(features, self.projector)

    @property
    def takes_features(self) -> bool:
        """Whether features of the tower may be computed ahead: nothing changes or reads what is inside it."""
        return self.tome is None and self._tap is None

    def _read(self, questions: Encoded | None) -> Instruction | None:
        """Embedded questions; None without any, or where none are read."""
        if questions is None or self.instruction_tower is None:
            return None
        device = next(self.instruction_tower.parameters()).device
        ids, mask = (value.to(device, non_blocking=True) for value in questions)
        with _no_graph(self.instruction_tower):
            return Instruction(self.instruction_tower(ids, mask), mask)


def _rows(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The rows of all parts, or None where there are none."""
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])


def _placed(tokens: Tensor) -> CompressedTokens:
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
    return CompressedTokens(tokens, places, torch.ones(places.shape, device=tokens.device), places)


def compressor_section(fields: dict[str, Any] | None) -> CompressorConfig | None:
    """The section that a checkpoint's config holds as plain fields."""
    return None if fields is None else parse_compressor(fields)


def _no_graph(module: nn.Module) -> AbstractContextManager[Any]:
    trains = any(parameter.requires_grad for parameter in module.parameters())
    return nullcontext() if trains else torch.no_grad()


def _join(x: Tensor, num_frames: int) -> Tensor:
    """``(V * T, N, ...)`` to ``(V, T * N, ...)``."""
    return x.reshape(x.shape[0] // num_frames, num_frames * x.shape[1], *x.shape[2:])


def _first(questions: Encoded, number: int) -> Encoded:
    ids, mask = questions
    return ids[:number], mask[:number]


def _split(questions: Encoded | None, num_pictures: int) -> tuple[Encoded | None, Encoded | None]:
    if questions is None:
        return None, None
    ids, mask = questions
    return (ids[:num_pictures], mask[:num_pictures]), (ids[num_pictures:], mask[num_pictures:])
