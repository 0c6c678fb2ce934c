"""The command line: parse, call, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import importlib
import sys

import typer

_COMMANDS = (
    "data",
    "data_view",
    "data_toy",
    "train",
    "precompute",
    "estimate",
    "use",
    "serve",
    "demo",
    "show",
    "eval",
    "interop",
    "quickstart",
    "doctor",
)


def build_app() -> typer.Typer:
    """Return the application with every command registered."""
    app = typer.Typer(
        name="llava-scale",
        help="Train LLaVA-style multimodal language models at scale.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    data = typer.Typer(help="Make, check and look at training data.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(data, name="data")
    for name in _COMMANDS:
        module = importlib.import_module(f"llava_scale.cli.{name}")
        module.register(data if name.startswith("data") else app)
    return app


def main() -> None:
    """Run the command line; errors of ours end with one clear message and exit code 2."""
    from llava_scale.errors import LlavaScaleError

    try:
        build_app()()
    except LlavaScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
