"""The trained model as a plain folder for ``from_pretrained``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llava_scale.config.load import parse_config
from llava_scale.errors import CheckpointError
from llava_scale.model.card import ModelCard, card_of_run, write_card
from llava_scale.training.checkpoint import find_checkpoint, list_checkpoints, load_state, verify_checkpoint
from llava_scale.training.engine import Engine
from llava_scale.training.files import atomic_folder
from llava_scale.training.lora import add_adapters, has_adapters, merged_state, save_adapters
from llava_scale.training.parallel import Ranks
from llava_scale.training.recipe import apply_recipe, plan_recipe
from llava_scale.training.run_folder import RunFolder
from llava_scale.training.tensor_files import restore_model

if TYPE_CHECKING:
    from pathlib import Path


def write_model(folder: Path, engine: Engine, processor: Any, ranks: Ranks, *, card: ModelCard | None = None) -> None:
    """Write model and processor into ``folder``, whole or not at all. Every rank must call it; the first one writes.

    Adapters are merged into their layers, and lie beside the model in ``adapter/`` for peft.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    state = engine.full_state(keep=ranks.is_first)

    def write() -> None:
        with atomic_folder(folder) as partial:
            model: Any = engine.model
            adapted = has_adapters(model)
            model.save_pretrained(partial, state_dict=merged_state(model, state) if adapted else state)
            if adapted:
                save_adapters(model, partial / "adapter", state)
            processor.save_pretrained(partial)
            if card is not None:
                write_card(partial, card)

    ranks.from_first(write)


def export_checkpoint(run: Path, target: Path, *, step: int | None = None) -> int:
    """Write a checkpoint of the run in ``run``, of any number of processes, as a plain model folder ``target``.

    Args:
        run: Run folder; the run may be going on.
        target: Folder for ``from_pretrained``; must not exist.
        step: Which checkpoint; the newest whole one if None.

    Returns:
        Its step.

    Raises:
        CheckpointError: no such checkpoint, or it is damaged, or ``target`` exists or cannot be written.
    """
    from llava_scale.model import build_model

    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another folder")
    path = _choose(RunFolder(run).checkpoints, step)
    state = load_state(path)
    config = parse_config(state.config, origin=str(path / "config.yaml"))
    model, processor = build_model(config.model, chat_template=config.data.chat_template, seed=config.seed)
    if config.train.lora.rank:
        add_adapters(model, config.train.lora, torch.device("cpu"))
    apply_recipe(model, plan_recipe(model, config.train))
    restore_model(path, model)
    card = card_of_run(config, steps=state.step, results={})
    write_model(target, Engine(model.eval()), processor, Ranks(), card=card)
    return state.step


def _choose(folder: Path, step: int | None) -> Path:
    if step is None:
        found = find_checkpoint(folder).found
        if found is None:
            raise CheckpointError(f"{folder} holds no checkpoint yet")
        return found
    path = folder / f"step-{step:08d}"
    if path not in list_checkpoints(folder):
        known = ", ".join(str(int(item.name.removeprefix("step-"))) for item in list_checkpoints(folder)) or "none"
        raise CheckpointError(f"{folder} holds no checkpoint of step {step}; there are: {known}")
    problem = verify_checkpoint(path)
    if problem is not None:
        raise CheckpointError(f"{path} is damaged: {problem}")
    return path
