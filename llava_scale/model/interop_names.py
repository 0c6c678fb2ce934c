"""Names of parameters in three layouts: ours, the original LLaVA's, and transformers' LLaVA.

=============================  =============================================  =====================================
ours                           original LLaVA                                 transformers
=============================  =============================================  =====================================
``vision_tower.model.X``       ``model.vision_tower.vision_tower.             ``vision_tower.vision_model.X``
                               vision_model.X``
``projector.0``, ``.2``        ``model.mm_projector.0``, ``.2``; a single     ``multi_modal_projector.linear_1``,
                               layer without number                           ``linear_2``
``language_model.model.X``     ``model.X``                                    ``language_model.model.X``
``language_model.lm_head``     ``lm_head``                                    ``language_model.lm_head``
=============================  =============================================  =====================================

transformers' layout here is the one that its versions 4 and 5 both load in full: version 5 writes vision towers
without ``vision_model.``, which version 4.57 would leave at random weights. Both are understood when reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Rename = Callable[[str], "str | None"]

_PROJECTOR = re.compile(r"^(?:.*\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)$")
_LINEAR = re.compile(r"^multi_modal_projector\.linear_([12])\.(weight|bias)$")
_LINEAR_LAYER = {"1": "0", "2": "2"}
_CONSTANTS = re.compile(r"\.(?:rotary_emb\.inv_freq|embeddings\.position_ids)$")


def is_constant(name: str) -> bool:
    """Whether ``name`` is a buffer that old checkpoints hold and every model computes anew."""
    return _CONSTANTS.search(name) is not None


def projector_name(name: str) -> str | None:
    """Our name of a parameter of LLaVA's ``mm_projector``, however it is prefixed; None for any other."""
    found = _PROJECTOR.match(name)
    return f"projector.{found[1] or 0}.{found[2]}" if found else None


def from_llava(name: str) -> str | None:
    """Our name of a parameter of the original LLaVA; None for one that it has no place for."""
    projector = projector_name(name)
    if projector is not None:
        return projector
    vision = name.removeprefix("model.vision_tower.vision_tower.")
    if vision != name:
        return f"vision_tower.model.{vision.removeprefix('vision_model.')}"
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith(("model.embed_tokens.", "model.layers.", "model.norm.")):
        return f"language_model.{name}"
    return None


def to_llava(name: str, *, single_layer: bool) -> str | None:
    """Name that the original LLaVA gives one of our parameters; None for one that it has no place for.

    Args:
        name: Ours.
        single_layer: The projector is one linear layer, which the original does not number.
    """
    part, _, rest = name.partition(".")
    if part == "projector":
        return f"model.mm_projector.{rest.removeprefix('0.') if single_layer else rest}"
    if part == "vision_tower":
        return f"model.vision_tower.vision_tower.vision_model.{_vision_rest(rest)}"
    return rest if part == "language_model" else None


def from_transformers(name: str) -> str | None:
    """Our name of a parameter of transformers' LLaVA, of version 4 or 5; None for one that it has no place for."""
    name = name.removeprefix("model.")
    found = _LINEAR.match(name)
    if found:
        return f"projector.{_LINEAR_LAYER[found[1]]}.{found[2]}"
    if name.startswith("vision_tower."):
        return f"vision_tower.model.{_vision_rest(name.removeprefix('vision_tower.'))}"
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if not name.startswith("language_model."):
        return None
    inner = name.removeprefix("language_model.")
    return f"language_model.{inner}" if inner.startswith(("model.", "lm_head.")) else f"language_model.model.{inner}"


def to_transformers(name: str) -> str | None:
    """Name of one of our parameters in transformers' LLaVA; None for one that it has no place for."""
    part, _, rest = name.partition(".")
    if part == "projector":
        layer, _, kind = rest.partition(".")
        number = {"0": 1, "2": 2}.get(layer)
        return f"multi_modal_projector.linear_{number}.{kind}" if number else None
    if part == "vision_tower":
        return f"vision_tower.vision_model.{_vision_rest(rest)}"
    return name if part == "language_model" else None


def adapter_target(module: str, layout: str) -> str | None:
    """Module of our language model as ``layout`` (``llava``, ``transformers``) calls it in memory; None for others."""
    if not module.startswith("language_model.model."):
        return None
    inner = module.removeprefix("language_model.model.")
    return f"model.{inner}" if layout == "llava" else f"model.language_model.{inner}"


def _vision_rest(name: str) -> str:
    return name.removeprefix("model.").removeprefix("vision_model.")
