"""``llava-scale data show | stats``: look at a data set as the model gets it."""

from __future__ import annotations

from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llava_scale.config import Config
    from llava_scale.model import LlavaScaleProcessor
    from llava_scale.viz.dataset import ModelSide
    from llava_scale.viz.dataset_stats import DatasetStats, PackingOptions

_SHOWN = 5
"""Unusable samples shown on the terminal."""

DataPath = Annotated[str, typer.Argument(metavar="PATH", help="Data set: folder or URL of shards.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Recipe (YAML) of the training to look through.")]
CheckpointOption = Annotated[Path | None, typer.Option(help="Model to look through; only its processor is loaded.")]
PresetOption = Annotated[str, typer.Option(help="Preset model to look through, such as tiny.")]
TokenizerOption = Annotated[str, typer.Option(help="Tokenizer alone: hub name or folder.")]
TemplateOption = Annotated[str, typer.Option(help="Chat template instead of the recipe's: plain, vicuna_v1, native.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command()(show)
    app.command()(stats)


def show(
    path: DataPath,
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("samples.html"),
    num: Annotated[int, typer.Option(min=1, help="Samples, spread evenly over the data set.")] = 12,
    key: Annotated[list[str] | None, typer.Option(help="Show this sample instead; may be given several times.")] = None,
    config: ConfigOption = None,
    checkpoint: CheckpointOption = None,
    preset: PresetOption = "",
    tokenizer: TokenizerOption = "",
    template: TemplateOption = "",
) -> None:
    """Write a page of samples as the model gets them: pictures before and after, tokens, what is learned."""
    from llava_scale.data.dataset import open_dataset
    from llava_scale.viz.dataset import choose_samples, write_samples_page

    model, _ = _model_side(config, checkpoint, preset, tokenizer, template)
    with closing(open_dataset(path)) as dataset:
        page = write_samples_page(dataset, choose_samples(dataset, num, key or ()), out, model)
    print(f"{page}: open it in a browser")


def stats(
    path: DataPath,
    out: Annotated[Path, typer.Option(help="Folder for stats.html and the diagrams.")] = Path("stats"),
    limit: Annotated[int, typer.Option(min=0, help="Most samples to look at, spread evenly; 0 takes all.")] = 20_000,
    config: ConfigOption = None,
    checkpoint: CheckpointOption = None,
    preset: PresetOption = "",
    tokenizer: TokenizerOption = "",
    template: TemplateOption = "",
) -> None:
    """Lengths, picture sizes, modalities and turns of a data set; tokens too where a model is named.

    With --config, rows are filled as training would fill them.
    """
    from llava_scale.data.dataset import open_dataset
    from llava_scale.viz.dataset_stats import collect_stats, write_stats_page

    model, packing = _model_side(config, checkpoint, preset, tokenizer, template)
    with closing(open_dataset(path)) as dataset, _progress() as on_progress:
        result = collect_stats(dataset, model, limit=limit, packing=packing, on_progress=on_progress)
    page = write_stats_page(result, out)
    _print_stats(result)
    print(f"{page}: open it in a browser")


def _model_side(
    config: Path | None, checkpoint: Path | None, preset: str, tokenizer: str, template: str
) -> tuple[ModelSide, PackingOptions | None]:
    """What to look through, and how rows are packed where a config says so."""
    from llava_scale.config import ModelConfig, load_config
    from llava_scale.errors import ConfigError
    from llava_scale.viz.dataset import ModelSide

    given = [name for name, value in _names(config, checkpoint, preset, tokenizer) if value]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other: give one of them")
    if template and not given:
        raise ConfigError("--template needs a model: give --config, --checkpoint, --preset or --tokenizer too")
    if not given:
        return ModelSide(), None
    if config is not None:
        settings = load_config(config)
        return _config_side(settings, template), _packing_of(settings)
    if tokenizer:
        return _tokenizer_side(tokenizer, template or "native"), None
    from llava_scale.model.build import build_processor, load_processor

    if checkpoint is not None:
        return _side_of(load_processor(checkpoint, chat_template=template), str(checkpoint)), None
    if preset != "tiny":
        raise ConfigError(f"unknown preset {preset!r}; known: tiny")
    processor = build_processor(ModelConfig(preset="tiny"), chat_template=template or "native")
    return _side_of(processor, "preset tiny"), None


def _names(
    config: Path | None, checkpoint: Path | None, preset: str, tokenizer: str
) -> list[tuple[str, Path | str | None]]:
    return [("--config", config), ("--checkpoint", checkpoint), ("--preset", preset), ("--tokenizer", tokenizer)]


def _tokenizer_side(name: str, template: str) -> ModelSide:
    from transformers import AutoTokenizer

    from llava_scale.data.chat import ChatEncoder
    from llava_scale.errors import ConfigError
    from llava_scale.model.build import add_placeholders
    from llava_scale.viz.dataset import ModelSide

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer {name!r} cannot be loaded: {error}") from error
    add_placeholders(tokenizer)
    return ModelSide(name=f"tokenizer {name}", encoder=ChatEncoder(tokenizer, template))


def _config_side(settings: Config, template: str) -> ModelSide:
    from llava_scale.model.build import build_processor

    processor = build_processor(settings.model, chat_template=template or settings.data.chat_template)
    row_length = settings.data.packing.row_length if settings.data.truncate == "error" else 0
    return _side_of(processor, settings.name, row_length=row_length)


def _packing_of(settings: Config) -> PackingOptions | None:
    from llava_scale.viz.dataset_stats import PackingOptions

    packing = settings.data.packing
    if packing.mode != "tokens":
        return None
    return PackingOptions(
        row_length=packing.row_length,
        lookahead_rows=packing.lookahead_rows,
        truncate=settings.data.truncate == "text",
    )


def _side_of(processor: LlavaScaleProcessor, name: str, *, row_length: int = 0) -> ModelSide:
    from llava_scale.viz.dataset import ModelSide

    return ModelSide(
        name=name,
        encoder=processor.chat_encoder,
        counter=processor.token_counter,
        transform=processor.image_transform,
        video=processor.video_transform,
        row_length=row_length,
    )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error that goes away at the end; the callable takes samples done and in all."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("samples", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print_stats(result: DatasetStats) -> None:
    from rich.console import Console
    from rich.table import Table

    from llava_scale.viz.dataset_stats import summary_rows
    from llava_scale.viz.page import number, percent

    print(f"{result.path}: {result.num_samples:,} samples, {result.num_looked_at:,} looked at")
    table = Table("", "mean", "5 %", "median", "95 %", "largest")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in summary_rows(result):
        table.add_row(name, *(number(round(value, 1), digits=4) for value in values))
    Console().print(table)
    print("media: " + ", ".join(f"{name} {count:,}" for name, count in result.mixes.most_common()))
    if result.row_fill:
        fill = sum(result.row_fill) / len(result.row_fill)
        print(f"rows: {len(result.row_fill):,} of {result.row_length:,} tokens, {percent(fill)} full")
    if result.num_too_long:
        print(f"{result.num_too_long:,} samples are longer than a row")
    for key, reason in result.bad[:_SHOWN]:
        print(f"cannot be used: {key}: {reason}")
    if len(result.bad) > _SHOWN:
        print(f"... {len(result.bad):,} in all, listed on the page")
