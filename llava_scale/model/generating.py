"""Media in ``generate``: they go in with the first step, and follow their rows where rows are repeated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MEDIA_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "video_grids",
    "audio_values",
    "audio_lengths",
    "audio_grids",
    "instruction_ids",
    "instruction_mask",
)
"""Arguments of ``forward`` that belong to media, and go into the first step of generation only."""


class MediaGeneration:
    """What ``generate`` of transformers asks of a model with media; mixed into it before transformers' own classes."""

    config: Any
    audio_tower: Any

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        is_first_iteration: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step of ``generate``; media only go in while the cache does not hold them yet."""
        media = {name: kwargs.pop(name, None) for name in MEDIA_INPUTS}
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        return {**inputs, **media} if is_first_iteration or not use_cache else inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each row for beams and several answers, with all of its media and questions behind each copy."""
        media = {name: kwargs.pop(name) for name in MEDIA_INPUTS if name in kwargs}
        if expand_size > 1 and input_ids is not None:
            media = self._repeat_media(media, input_ids, expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return input_ids, {**kwargs, **media}

    def _repeat_media(self, media: dict[str, Any], input_ids: Tensor, copies: int) -> dict[str, Any]:
        """Media of ``copies`` of each row of ``input_ids``."""
        repeated = dict(media)
        orders = []
        pixels = media.get("pixel_values")
        if pixels is not None:
            order = self._order("image", [self.num_visual_tokens()] * len(pixels), input_ids, copies)  # type: ignore[attr-defined]
            repeated["pixel_values"] = pixels[order]
            orders.append(order)
        frames = media.get("pixel_values_videos")
        if frames is not None:
            grids = _grids(media.get("video_grids"), (len(frames), *self._frame_grid))  # type: ignore[attr-defined]
            counts = [self.num_visual_tokens(grid[0]) for grid in grids]  # type: ignore[attr-defined]
            order = self._order("video", counts, input_ids, copies)
            videos = torch.split(frames, [grid[0] for grid in grids])
            repeated["pixel_values_videos"] = torch.cat([videos[number] for number in order])
            repeated["video_grids"] = [grids[number] for number in order]
            orders.append(order)
        if media.get("audio_values") is not None:
            repeated |= self._repeat_sounds(media, input_ids, copies)
        questions = _behind_each_other(orders)
        for name in ("instruction_ids", "instruction_mask"):
            if media.get(name) is not None and questions:
                repeated[name] = media[name][questions]
        return repeated

    def _repeat_sounds(self, media: dict[str, Any], input_ids: Tensor, copies: int) -> dict[str, Any]:
        values, lengths = media["audio_values"], media["audio_lengths"]
        features = self.audio_tower.frontend.window_tokens(lengths.cpu()).tolist()
        grids = _grids(media.get("audio_grids"), (1, 1, sum(features)))
        counts = [self.num_audio_tokens(grid) for grid in grids]  # type: ignore[attr-defined]
        order = self._order("audio", counts, input_ids, copies)
        windows = _grouped(features, [grid[2] for grid in grids])
        chosen = [window for number in order for window in windows[number]]
        return {
            "audio_values": values[chosen],
            "audio_lengths": lengths[chosen],
            "audio_grids": [grids[number] for number in order],
        }

    def _order(self, kind: str, counts: Sequence[int], input_ids: Tensor, copies: int) -> list[int]:
        """Numbers of the media of one kind of each row, ``copies`` times before those of the next row."""
        places = (input_ids == getattr(self.config, f"{kind}_token_id")).sum(1).tolist()
        return [number for of_row in _grouped(counts, places) for _ in range(copies) for number in of_row]


def _grids(given: Any, alone: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    if given is None:
        return [alone]
    return [tuple(grid) for grid in (given.tolist() if isinstance(given, Tensor) else given)]


def _grouped(sizes: Sequence[int], totals: Sequence[int]) -> list[list[int]]:
    """Consecutive numbers of ``sizes``, as many for each of ``totals`` as add up to it."""
    groups: list[list[int]] = []
    start = 0
    for total in totals:
        group: list[int] = []
        while sum(sizes[number] for number in group) < total and start < len(sizes):
            group.append(start)
            start += 1
        groups.append(group)
    return groups


def _behind_each_other(orders: Sequence[Sequence[int]]) -> list[int]:
    """Orders of several lists as one of the joined list."""
    joined: list[int] = []
    start = 0
    for order in orders:
        joined += [start + number for number in order]
        start += len(set(order))
    return joined
