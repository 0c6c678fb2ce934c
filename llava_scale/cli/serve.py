"""``llava-scale serve``: a model behind OpenAI's API."""

from __future__ import annotations

from typing import Annotated

import typer

from llava_scale.cli.common import Checkpoint, Device, Dtype, DtypeOption, check_server, load_engine, name_of


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command()(serve)


def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    model_name: Annotated[str, typer.Option(help="What clients call the model; its run or folder by default.")] = "",
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that run at once.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Further requests that may wait; more get 429.")] = 64,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Longest request in MB; longer ones get 413.")] = 32.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 1024,
    allow_url: Annotated[
        list[str] | None, typer.Option(help="Host that media may be fetched from over https; several times for more.")
    ] = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Answer OpenAI chat completions over HTTP, with pictures, videos and sounds, many at once.

    /v1/chat/completions, /v1/models, /health, /metrics. Media come in the request as base64; no local file is read.
    """
    from llava_scale.serving.fetch import Fetcher
    from llava_scale.serving.http import make_server
    from llava_scale.serving.server import ServerSettings

    settings = ServerSettings(
        model_name=model_name or name_of(checkpoint),
        max_batch=max_batch,
        max_queue=max_queue,
        max_body_mb=max_body_mb,
        max_new_tokens=max_new_tokens,
        fetcher=Fetcher.for_hosts(allow_url or (), max_bytes=int(max_body_mb * 1e6)),
    )
    check_server("uvicorn", "serve", host=host, port=port)
    server = make_server(load_engine(checkpoint, device, dtype), settings, host=host, port=port)
    typer.echo(f"{settings.model_name} at http://{host}:{port}/v1 (Ctrl-C ends it)")
    server.run()
