"""The trained model as a plain folder for ``from_pretrained``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_scale.training.files import atomic_folder
from llava_scale.training.lora import has_adapters, merged_state, save_adapters

if TYPE_CHECKING:
    from pathlib import Path

    from llava_scale.training.engine import Engine
    from llava_scale.training.parallel import Ranks


def write_model(folder: Path, engine: Engine, processor: Any, ranks: Ranks) -> None:
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

    ranks.from_first(write)
