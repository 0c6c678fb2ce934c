"""A cut vision tower as a whole one of transformers: its config, all of its weights, and which layer is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from llava_scale.errors import CheckpointError
from llava_scale.model.interop_files import State
from llava_scale.model.interop_names import from_llava, from_transformers, is_constant
from llava_scale.model.interop_plan import Exportable

PREFIX = "vision_tower.model."

_FILLED = ("post_layernorm.weight", "post_layernorm.bias")
"""Behind the last block, where features are taken before it: constants that change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTower:
    """A vision tower with all that transformers' class of it expects.

    Attributes:
        config: Its config as a dictionary.
        state: Its weights by the names of that class.
        feature_layer: Hidden state that is used, counted as in LLaVA.
    """

    config: dict[str, Any]
    state: State
    feature_layer: int


def whole_tower(source: Exportable) -> WholeTower:
    """The vision tower of ``source`` as a whole.

    With the blocks that an import kept it is the very tower that was imported. Else it ends with the block whose
    features are used (``feature_layer`` -1), which gives the same features.

    Raises:
        CheckpointError: weights of the tower are missing.
    """
    kept = {name.removeprefix(PREFIX): value for name, value in source.state.items() if name.startswith(PREFIX)}
    kept = {name.removeprefix("vision_model."): value for name, value in kept.items()}
    state = {**kept, **_unused(source)}
    config = plain_dict(source.config.vision_config)
    if state.keys() >= _expected(config):
        return WholeTower(config=config, state=state, feature_layer=source.config.vision_feature_layer)
    config = {**config, "num_hidden_layers": source.num_blocks}
    if config["model_type"] == "siglip_vision_model":
        config["vision_use_head"] = False
    width = config["hidden_size"]
    like = next(iter(kept.values()))
    constants = dict(zip(_FILLED, (torch.ones(width), torch.zeros(width)), strict=True))
    state = {**{name: value.to(like.dtype) for name, value in constants.items()}, **kept}
    missing = sorted(_expected(config) - state.keys())
    if missing:
        raise CheckpointError(f"{source.path} lacks {len(missing)} weights of its vision tower, first {missing[0]!r}")
    return WholeTower(config=config, state=state, feature_layer=-1)


def select_strategy(source: Exportable) -> str:
    """transformers' ``vision_feature_select_strategy``: ``default`` drops the class token, ``full`` drops nothing."""
    has_class_token = source.config.vision_config.model_type == "clip_vision_model"
    return "default" if has_class_token and source.config.vision_feature_select == "patch" else "full"


def plain_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """A sub-config without what every config has and nobody set."""
    fields: dict[str, Any] = config.to_diff_dict()
    dropped = ("transformers_version", "_name_or_path", "architectures", "_attn_implementation", "dtype")
    return {"model_type": config.model_type, **{k: v for k, v in fields.items() if k not in dropped}}


def _unused(source: Exportable) -> State:
    """Weights of the tower that an import kept, by names inside the tower."""
    if source.source is None:
        return {}
    rename = from_llava if source.source.layout == "llava" else from_transformers
    ours = {rename(name) or "": value for name, value in source.source.unused.items() if not is_constant(name)}
    return {name.removeprefix(PREFIX): value for name, value in ours.items() if name.startswith(PREFIX)}


def _expected(config: dict[str, Any]) -> set[str]:
    """Names of all weights of a tower of this config."""
    fields = dict(config)
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    return {name.removeprefix("vision_model.") for name in model.state_dict()}
