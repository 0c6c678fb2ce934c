"""``llava-scale demo``: a web page to try a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llava_scale.cli.common import Checkpoint, Device, Dtype, DtypeOption, check_server, load_engine, name_of

if TYPE_CHECKING:
    from torch import Tensor


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command()(demo)


def demo(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    max_file_mb: Annotated[float, typer.Option(min=0.001, help="Longest file that is taken, in MB.")] = 64.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Open a web page for pictures, videos, sounds and questions, with token counts and merge maps."""
    from llava_scale.serving.chat import AnswerSettings
    from llava_scale.serving.demo import build_page, launch

    check_server("gradio", "demo", host=host, port=port)
    engine, title = load_engine(checkpoint, device, dtype), name_of(checkpoint)
    page = build_page(engine, AnswerSettings(max_new_tokens=max_new_tokens), draw_map, title=title)
    typer.echo(f"{title} at http://{host}:{port} (Ctrl-C ends it)")
    launch(page, host=host, port=port, max_file_mb=max_file_mb)


def draw_map(pixels: Tensor, grid: tuple[int, int, int], group: Tensor, anchors: Tensor) -> bytes:
    """PNG of what became of a picture's tokens."""
    from llava_scale.viz.token_maps import MergeMap
    from llava_scale.viz.tokens import draw_merges

    title = f"{group.numel()} tokens to {anchors.numel()}"
    merge_map = MergeMap(title=title, grid=grid, group=group.numpy(), anchors=anchors.numpy())
    return draw_merges(pixels.permute(1, 2, 0).numpy()[None], [merge_map])
