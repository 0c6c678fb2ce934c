"""What the other formats can hold, and what an import keeps for the way back."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.model.configuration import LlavaScaleConfig
from llava_scale.model.interop_files import State, read_json, read_state, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from llava_scale.model.processing import LlavaScaleProcessor

IMPORTED = "imported"
"""Folder inside an imported checkpoint: what only its old format has a place for."""

_KEPT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_NOT_KEPT = ("*.index.json", "trainer_state.json", "training_args.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where an imported checkpoint came from.

    Attributes:
        layout: ``llava`` or ``transformers``.
        has_vision: Whether its weights held the vision tower.
        config: Its ``config.json``.
        unused: Tensors that our model has no use for, by their names there: blocks of the tower above the features.
        folder: Its other files.
    """

    layout: str
    has_vision: bool
    config: dict[str, Any]
    unused: State = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exportable:
    """A checkpoint of ours, read for export.

    Attributes:
        path: Its folder.
        config: Its config.
        state: Its weights by our names.
        processor: Its processor.
        source: Where it was imported from, or None.
    """

    path: Path
    config: LlavaScaleConfig
    state: State
    processor: LlavaScaleProcessor
    source: Source | None

    @property
    def num_blocks(self) -> int:
        """Blocks of the vision tower that are left after cutting."""
        prefix = "vision_tower.model.encoder.layers."
        numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in self.state if name.startswith(prefix)}
        return len(numbers)

    def with_state(self, state: State) -> Exportable:
        """The same with other weights."""
        return replace(self, state=state)


def keep_source(folder: Path, source: Path, kept: Source) -> None:
    """Write into the checkpoint ``folder`` what a later export needs of ``source``."""
    place = folder / IMPORTED
    place.mkdir()
    for pattern in _KEPT_FILES:
        for path in source.glob(pattern):
            if not any(path.match(other) for other in _NOT_KEPT):
                shutil.copyfile(path, place / path.name)
    write_json(place / "source.json", {"layout": kept.layout, "has_vision": kept.has_vision})
    if kept.unused:
        write_tensors(place / "unused.safetensors", kept.unused)


def read_exportable(path: Path) -> Exportable:
    """Read a checkpoint of ours for export.

    Raises:
        CheckpointError: no checkpoint of ours there.
        ConfigError: it has parts that no other format has a place for.
    """
    from llava_scale.model.build import load_processor

    fields = read_json(path / "config.json")
    if fields.get("model_type") != LlavaScaleConfig.model_type:
        inside = path / "final"
        hint = f"; the model of this run is {inside}" if inside.is_dir() else ""
        raise CheckpointError(f"{path} holds no model of llava-scale{hint}")
    config = LlavaScaleConfig.from_pretrained(path)
    check_plain(config)
    return Exportable(
        path=path, config=config, state=read_state(path), processor=load_processor(path), source=_read_source(path)
    )


def check_plain(config: LlavaScaleConfig) -> None:
    """Refuse models with parts that only this package knows.

    Raises:
        ConfigError: names the part.
    """
    if config.compressor is not None:
        raise ConfigError(
            f"this model compresses its visual tokens ({config.compressor.get('type')}), which no other format has a "
            "place for; only models without model.compressor can be exported (serve this one with llava-scale)"
        )
    for part, there in (("hears (an audio tower)", config.audio), ("reads questions", config.instruction_config)):
        if there is not None:
            raise ConfigError(f"this model {part}, which no other format has a place for; serve it with llava-scale")
    if config.projector.get("input_norm"):
        raise ConfigError("model.projector.input_norm has no place in other formats; train without it to export")
    family = config.vision_config.model_type
    if family not in ("clip_vision_model", "siglip_vision_model"):
        raise ConfigError(f"vision towers of type {family} cannot be exported; known: CLIP and SigLIP")


def rename_all(state: State, rename: Any, *, origin: str) -> State:
    """``state`` by other names.

    Raises:
        CheckpointError: a parameter has no name there.
    """
    renamed: State = {}
    for name, tensor in state.items():
        new = rename(name)
        if new is None:
            raise CheckpointError(f"{origin}: parameter {name!r} has no place in the other layout")
        renamed[new] = tensor
    return renamed


def _read_source(path: Path) -> Source | None:
    folder = path / IMPORTED
    about = read_json(folder / "source.json")
    if not about:
        return None
    unused = folder / "unused.safetensors"
    return Source(
        layout=str(about.get("layout")),
        has_vision=bool(about.get("has_vision")),
        config=read_json(folder / "config.json"),
        unused=read_tensors(unused) if unused.is_file() else {},
        folder=folder,
    )
