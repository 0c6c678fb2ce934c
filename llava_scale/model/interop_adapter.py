"""LoRA adapters beside an exported model instead of merged into it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava_scale.config import load_config
from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.model.build import build_model
from llava_scale.model.interop_files import State, read_json, read_state, read_tensors, write_json, write_tensors
from llava_scale.model.interop_names import adapter_target
from llava_scale.model.interop_plan import Exportable

ADAPTER = "adapter"
"""Folder inside a checkpoint that holds what peft reads."""

_KEY = re.compile(r"^base_model\.model\.(.+)\.(lora_(?:A|B|magnitude_vector).*)$")


def without_adapters(source: Exportable, base: Path | None) -> Exportable:
    """``source`` with the weights that its adapted layers had without their adapters.

    Args:
        source: With adapters merged, and ``adapter/`` beside them.
        base: Checkpoint of ours that the run started from; None builds it again from the run's ``config.yaml``.

    Raises:
        CheckpointError: there are no adapters, or the base is another model.
    """
    modules = adapted_modules(source.path)
    start = read_state(base) if base is not None else _start_of_run(source.path)
    state = dict(source.state)
    for module in modules:
        for kind in ("weight", "bias"):
            name = f"{module}.{kind}"
            if name not in state:
                continue
            if name not in start or start[name].shape != state[name].shape:
                raise CheckpointError(
                    f"{base or 'the model that the run started from'} has no {name} like this model's"
                )
            state[name] = start[name].to(state[name].dtype)
    return replace(source, state=state)


def adapted_modules(path: Path) -> list[str]:
    """Modules that carry adapters, by our names.

    Raises:
        CheckpointError: the checkpoint has no adapters.
    """
    return sorted({_parse(name)[0] for name in _adapters(path)})


def write_adapter(source: Path, folder: Path, layout: str) -> None:
    """Write the adapters of the checkpoint ``source`` into ``folder`` for peft, by the names of ``layout``.

    Raises:
        ConfigError: an adapter lies outside of the language model, whose modules alone have the same names in every
            version of the other formats.
    """
    targets: dict[str, str] = {}
    tensors: State = {}
    for name, value in _adapters(source).items():
        module, rest = _parse(name)
        target = adapter_target(module, layout)
        if target is None:
            raise ConfigError(f"the adapter of {module} has no place there; export with adapters merged")
        targets[module] = target
        tensors[f"base_model.model.{target}.{rest}"] = value
    fields: dict[str, Any] = read_json(source / ADAPTER / "adapter_config.json")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", {**fields, "target_modules": sorted(targets.values())})
    write_tensors(folder / "adapter_model.safetensors", tensors)


def write_rest(state: State, folder: Path) -> None:
    """What the original LLaVA reads beside adapters: the trained weights that are none, from a pickled file."""
    rest = {f"base_model.model.{name}": value.clone() for name, value in state.items() if ".mm_projector." in name}
    torch.save(rest, folder / "non_lora_trainables.bin")


def _adapters(path: Path) -> State:
    file = path / ADAPTER / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{path} has no adapters ({ADAPTER}/adapter_model.safetensors); it was trained without")
    return read_tensors(file)


def _parse(name: str) -> tuple[str, str]:
    found = _KEY.match(name)
    if found is None:
        raise CheckpointError(f"{name!r} is no adapter's name")
    return found[1], found[2]


def _start_of_run(path: Path) -> State:
    """Weights that the run around ``path`` started from."""
    recipe = path.resolve().parent / "config.yaml"
    if not recipe.is_file():
        raise CheckpointError(
            f"{path} does not lie in a run folder, so the weights without adapters are not known; "
            "name the checkpoint that training started from with --base"
        )
    config = load_config(recipe)
    model, _ = build_model(config.model, chat_template=config.data.chat_template, seed=config.seed)
    return dict(model.state_dict())
