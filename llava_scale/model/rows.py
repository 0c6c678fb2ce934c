"""Packed rows of the data layer to arguments of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llava_scale.types import PackedRow


_PIXELS_AND_SOUNDS = ("pixel_values", "pixel_values_videos", "audio_values", "audio_lengths")


def row_inputs(row: PackedRow, *, device: torch.device | str | None = None) -> dict[str, Any]:
    """Arguments of the model's ``forward`` for one packed row.

    Given a ``device``, the row's tensors are moved there as far as the model wants them there: labels and offsets stay
    where they are. For a row on the CPU the model then never waits for the accelerator.
    """
    target = row.input_ids.device if device is None else torch.device(device)
    inputs: dict[str, Any] = {
        "input_ids": row.input_ids.unsqueeze(0).to(target, non_blocking=True),
        "position_ids": row.position_ids.unsqueeze(0).to(target, non_blocking=True),
        "labels": row.labels.unsqueeze(0),
        "cu_seq_lens": row.cu_seq_lens,
        "video_grids": row.video_grids or None,
        "audio_grids": row.audio_grids or None,
        "instructions": row.instructions or None,
        "step": row.step,
    }
    for name in (*_PIXELS_AND_SOUNDS, "image_features", "video_features", "audio_features"):
        values = getattr(row, name)
        inputs[name] = None if values is None else values.to(target, non_blocking=True)
    return inputs
