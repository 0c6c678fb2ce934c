"""Checkpoints to and from the formats of other tools.

``import_checkpoint`` reads the original LLaVA's layout, transformers' ``LlavaForConditionalGeneration`` and a lone
``mm_projector.bin``; ``export_checkpoint`` writes the first two and GGUF for llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_scale.errors import ConfigError, suggest
from llava_scale.model.card import read_card, write_card
from llava_scale.model.interop_adapter import ADAPTER, without_adapters, write_adapter, write_rest
from llava_scale.model.interop_export import projector_file, write_llava, write_transformers
from llava_scale.model.interop_files import new_folder, read_state
from llava_scale.model.interop_gguf import write_gguf
from llava_scale.model.interop_import import ImportSettings, detect_layout, import_checkpoint
from llava_scale.model.interop_plan import Exportable, read_exportable

__all__ = ["FORMATS", "ExportSettings", "ImportSettings", "detect_layout", "export_checkpoint", "import_checkpoint"]

FORMATS = ("llava", "transformers", "gguf")
LORA = ("merged", "apart")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """How a checkpoint is exported.

    Attributes:
        to: ``llava``, ``transformers`` or ``gguf``.
        lora: ``merged``, or ``apart`` for the weights without adapters and the adapters beside them.
        base: With ``apart``: checkpoint of ours that training started from; None takes the run's config.
        vision_tower: For ``llava``: name under which the original finds the tower; empty writes the tower out.
        projector_only: For ``llava``: only ``mm_projector.bin``.
        gguf_type: For ``gguf``: ``f16`` or ``f32``.
    """

    to: str
    lora: str = "merged"
    base: Path | None = None
    vision_tower: str = ""
    projector_only: bool = False
    gguf_type: str = "f16"

    def __post_init__(self) -> None:
        for name, value, known in (("--to", self.to, FORMATS), ("--lora", self.lora, LORA)):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}; {suggest(value, known)}")
        if self.to == "gguf" and self.lora == "apart":
            raise ConfigError("GGUF files hold adapters merged; leave out --lora apart")
        if self.base is not None and self.lora != "apart":
            raise ConfigError("--base is for --lora apart")
        if self.to != "llava" and (self.vision_tower or self.projector_only):
            raise ConfigError("--vision-tower and --projector-only are for --to llava")


def export_checkpoint(path: Path, target: Path, settings: ExportSettings) -> None:
    """Write the checkpoint of ours in ``path`` in another format into the new folder ``target``, with a model card.

    Raises:
        CheckpointError: no checkpoint of ours there, or ``target`` exists.
        ConfigError: the model has parts that the format has no place for.
    """
    source = read_exportable(path)
    if settings.lora == "apart":
        source = without_adapters(source, settings.base)
    with new_folder(target) as partial:
        if settings.projector_only:
            projector_file(source, partial / "mm_projector.bin")
        elif settings.to == "gguf":
            write_gguf(source, partial, file_type=settings.gguf_type)
        elif settings.to == "llava":
            write_llava(source, partial, vision_tower=settings.vision_tower)
        else:
            write_transformers(source, partial)
        if settings.lora == "apart":
            _write_apart(source, partial, settings.to)
        write_card(partial, read_card(path), layout=settings.to)


def _write_apart(source: Exportable, folder: Path, layout: str) -> None:
    write_adapter(source.path, folder / ADAPTER, layout)
    if layout == "llava":
        write_rest(read_state(folder), folder / ADAPTER)
