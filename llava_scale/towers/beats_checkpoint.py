"""Official BEATs checkpoints in and out: ``{'cfg': ..., 'model': ..., 'label_dict': ...}``."""

from __future__ import annotations

import pickle
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_scale.errors import CheckpointError
from llava_scale.towers.beats import BeatsTower
from llava_scale.towers.beats_config import BeatsConfig

_TABLE = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
_COPIED_TABLE = re.compile(r"encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight")
_PREFIX = "model.audio_tower."
"""What VideoLLaMA2 puts before the names of its tuned tower."""


def load_beats(path: str | Path, *, window_seconds: float = 10.0, dtype: torch.dtype = torch.float32) -> BeatsTower:
    """Read an official checkpoint file, pre-trained or fine-tuned, without running any code from it.

    Args:
        path: The ``.pt`` file.
        window_seconds: Longest window of the tower.
        dtype: Of the weights.

    Returns:
        The tower in evaluation mode, with the names of the classes if the file has them.

    Raises:
        CheckpointError: not such a file; its ``cfg`` is missing or incomplete; weights are missing or left over.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"BEATs checkpoint {path} cannot be read: {error}") from None
    parts = [content.get(name) if isinstance(content, dict) else None for name in ("cfg", "model")]
    if not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(
            f"{path} is no official BEATs checkpoint: it must hold 'cfg' and 'model'; the cfg decides what the weights "
            "mean and cannot be guessed"
        )
    labels = {int(number): str(name) for number, name in content.get("label_dict", {}).items()}
    tower = BeatsTower(BeatsConfig.from_dict(content["cfg"]), window_seconds=window_seconds, labels=labels)
    try:
        found = tower.model.load_state_dict(_own_names(content["model"], path), strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its own cfg: {error}") from None
    wrong = [f"lacks {name}" for name in found.missing_keys] + [f"has unknown {name}" for name in found.unexpected_keys]
    if wrong:
        raise CheckpointError(f"{path} does not fit its own cfg: {', '.join(wrong[:4])} ({len(wrong)} in all)")
    return tower.to(dtype).eval()


def official_checkpoint(tower: BeatsTower) -> dict[str, Any]:
    """The tower as the official code loads it; save it with ``torch.save``."""
    weights = dict(tower.model.state_dict())
    config = tower.model.config
    if config.relative_position_embedding:
        for layer in range(1, config.encoder_layers):
            weights[_TABLE.format(layer)] = weights[_TABLE.format(0)]
    cfg = asdict(config)
    cfg |= cfg.pop("extra")
    return {"cfg": cfg, "model": weights} | ({"label_dict": dict(tower.labels)} if tower.labels else {})


def _own_names(weights: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Weights under their own names, the shared table once."""
    if all(name.startswith(_PREFIX) for name in weights):
        weights = {name.removeprefix(_PREFIX): value for name, value in weights.items()}
    kept = {}
    for name, value in weights.items():
        if not _COPIED_TABLE.fullmatch(name):
            kept[name] = value
        elif not torch.equal(value, weights[_TABLE.format(0)]):
            raise CheckpointError(f"{path}: {name} differs from that of layer 0, but all layers share one table")
    return kept
