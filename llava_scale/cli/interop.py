"""``llava-scale import | export``: checkpoints from and for other tools."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Format(str, enum.Enum):
    """Formats that can be written."""

    llava = "llava"
    transformers = "transformers"
    gguf = "gguf"


class Lora(str, enum.Enum):
    """What becomes of adapters."""

    merged = "merged"
    apart = "apart"


class GgufType(str, enum.Enum):
    """Type of matrices in GGUF files."""

    f16 = "f16"
    f32 = "f32"


_NEXT = {
    "llava": "load it with the original LLaVA, or import it again",
    "transformers": "LlavaForConditionalGeneration.from_pretrained({out!r})",
    "gguf": "llama-mtmd-cli -m {out}/language-model-{kind}.gguf --mmproj {out}/mmproj-{kind}.gguf",
}


def register(app: typer.Typer) -> None:
    """Add ``import`` and ``export`` to ``app``."""
    app.command("import")(import_)
    app.command("export")(export)


def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of another format, or mm_projector.bin.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the checkpoint.")],
    language_model: Annotated[str, typer.Option(help="Language model of a projector that comes alone.")] = "",
    vision_tower: Annotated[str, typer.Option(help="Vision tower, if the source holds none.")] = "",
    chat_template: Annotated[str, typer.Option(help="plain, vicuna_v1 or native; found out without it.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; as in the source without it.")] = "",
) -> None:
    """Turn a checkpoint of the original LLaVA or of transformers' LLaVA into one of ours."""
    from transformers.utils.logging import disable_progress_bar

    from llava_scale.errors import ConfigError
    from llava_scale.model.interop import ImportSettings, import_checkpoint

    disable_progress_bar()
    if dtype not in ("", "float32", "bfloat16", "float16"):
        raise ConfigError(f"unknown dtype {dtype!r}; choose float32, bfloat16 or float16")
    settings = ImportSettings(
        language_model=language_model, vision_tower=vision_tower, chat_template=chat_template, dtype=dtype
    )
    layout = import_checkpoint(source, out, settings)
    typer.echo(f"{source} ({layout}) is a model in {out}")
    typer.echo(f"next        llava-scale chat {out} --image PICTURE 'QUESTION'")


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a model, such as RUN/final.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    to: Annotated[Format, typer.Option(help="Format.")],
    lora: Annotated[Lora, typer.Option(help="Adapters merged into the weights, or apart beside them.")] = Lora.merged,
    base: Annotated[Path | None, typer.Option(help="For --lora apart: the checkpoint training started from.")] = None,
    vision_tower: Annotated[str, typer.Option(help="For llava: name of the tower there; else it is written.")] = "",
    projector_only: Annotated[bool, typer.Option("--projector-only", help="For llava: mm_projector.bin only.")] = False,
    gguf_type: Annotated[GgufType, typer.Option(help="For gguf: type of matrices.")] = GgufType.f16,
) -> None:
    """Write a model for the original LLaVA, for transformers, or for llama.cpp (GGUF), with a model card."""
    from transformers.utils.logging import disable_progress_bar

    from llava_scale.model.interop import ExportSettings, export_checkpoint

    disable_progress_bar()
    settings = ExportSettings(
        to=to.value,
        lora=lora.value,
        base=base,
        vision_tower=vision_tower,
        projector_only=projector_only,
        gguf_type=gguf_type.value,
    )
    export_checkpoint(checkpoint, out, settings)
    typer.echo(f"{checkpoint} is written as {to.value} in {out}")
    typer.echo("next        " + _NEXT[to.value].format(out=str(out), kind=gguf_type.value))
