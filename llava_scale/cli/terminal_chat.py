"""The conversation of ``llava-scale chat`` in a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from llava_scale.errors import LlavaScaleError, SampleError, suggest

if TYPE_CHECKING:
    from llava_scale.serving.chat import ChatSession
    from llava_scale.types import MediaInfo, MediaKind

HELP = """\
/image PATH  add a picture to the next question (several times for several)
/video PATH  add a video
/audio PATH  add a sound
/reset       forget the conversation and its media
/save FILE   write the conversation as a sample of training data
/help        show this
/exit        leave, as Ctrl-D does
Ctrl-C stops an answer."""

_MEDIA: dict[str, tuple[MediaKind, str]] = {
    "/image": ("image", "picture"),
    "/video": ("video", "video"),
    "/audio": ("audio", "sound"),
}
_COMMANDS = (*_MEDIA, "/reset", "/save", "/help", "/exit")


def answer_once(session: ChatSession, question: str) -> None:
    """Print the answer to one question as it is written.

    Raises:
        SampleError: the question cannot be asked.
    """
    try:
        for piece in session.ask(question):
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        typer.echo()
        raise typer.Exit(130) from None
    typer.echo()


def talk(session: ChatSession, read: Callable[[str], str] = input) -> None:
    """Read questions and commands and print answers until the end of the input or ``/exit``."""
    _enable_line_editing()
    typer.echo("Ask away; /image PATH adds a picture, /help shows more, Ctrl-D leaves.")
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo("\n(Ctrl-D leaves)")
            continue
        if line == "/exit":
            return
        if line:
            _respond(session, line)


def _respond(session: ChatSession, line: str) -> None:
    """Do what one line asks; what goes wrong is said, and the conversation goes on."""
    try:
        if line.startswith("/"):
            _command(session, line)
        else:
            _answer(session, line)
    except LlavaScaleError as error:
        typer.echo(f"error: {error}")


def _answer(session: ChatSession, question: str) -> None:
    is_empty = True
    try:
        for piece in session.ask(question):
            typer.echo(piece, nl=False)
            is_empty = False
        typer.echo("(no answer)" if is_empty else "")
    except KeyboardInterrupt:
        typer.echo(" (stopped)")


def _command(session: ChatSession, line: str) -> None:
    name, _, argument = line.partition(" ")
    path = argument.strip().strip("'\"")
    if name in _MEDIA:
        kind, word = _MEDIA[name]
        if not path:
            raise SampleError(f"{name} needs the path of a {word}")
        info = session.add(kind, path)
        typer.echo(f"{word} {len(session.waiting[kind])} for the next question: {path} ({_described(info)})")
    elif name == "/reset":
        session.reset()
        typer.echo("forgotten")
    elif name == "/save":
        if not path:
            raise SampleError("/save needs the name of a file")
        session.save(path)
        typer.echo(f"written: {path}")
    elif name == "/help":
        typer.echo(HELP)
    else:
        raise SampleError(f"unknown command {name!r}; {suggest(name, _COMMANDS)}")


def _described(info: MediaInfo) -> str:
    size = f"{info.width} x {info.height}" if info.width else ""
    return ", ".join(filter(None, [size, f"{info.duration_s:.1f} s" if info.duration_s else ""]))


def _enable_line_editing() -> None:
    """Give ``input`` history and arrow keys where the platform has them."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
