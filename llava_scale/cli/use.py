"""``llava-scale chat | run | report``: use a trained model, and compare runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_scale.cli.common import Checkpoint, Device, Dtype, DtypeOption, load_engine, progress

if TYPE_CHECKING:
    from llava_scale.types import MediaKind

_SHOWN = 10  # bad lines on the terminal


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command()(chat)
    app.command()(run)
    app.command()(report)


def chat(
    checkpoint: Checkpoint,
    question: Annotated[str | None, typer.Argument(help="Answered at once; without it a conversation begins.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Picture to ask about; may be given several times.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="Video to ask about.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="Sound to ask about.")] = None,
    video_audio: Annotated[bool, typer.Option("--video-audio", help="Hear the sound tracks of videos too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawn answers repeatable.")] = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Ask a model about pictures, videos and sounds: one question, or a conversation in the terminal."""
    from llava_scale.cli.terminal_chat import answer_once, talk
    from llava_scale.serving.chat import AnswerSettings, ChatSession
    from llava_scale.serving.sampling import Sampling

    Sampling(temperature=temperature, top_p=top_p, seed=seed)  # refuses before the model is loaded
    settings = AnswerSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    session = ChatSession(load_engine(checkpoint, device, dtype), settings, video_audio=video_audio)
    attached: dict[MediaKind, list[Path] | None] = {"image": image, "video": video, "audio": audio}
    for kind, paths in attached.items():
        for path in paths or ():
            session.add(kind, path)
    if question is None:
        talk(session)
    else:
        answer_once(session, question)


def run(
    checkpoint: Checkpoint,
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One question a line.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="One answer a line, in the same order.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    media_root: Annotated[Path | None, typer.Option(help="Folder of the pictures; the one of IN by default.")] = None,
    allow_bad: Annotated[int, typer.Option(min=0, help="Lines with errors that still end with exit code 0.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over instead of going on.")] = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Answer a file of questions; a run that was cut off goes on where it was.

    A line of IN: {"id": ..., "image": "a.jpg" or ["a.jpg", "b.jpg"], "question": "..."}, with "video" and
    "audio" likewise, "video_audio": true to hear videos too and "video_clips": [[start, end]] for some seconds of them,
    or "conversations" as in LLaVA's JSON, ending with a human turn. OUT repeats it with "answer" or "error".
    """
    from llava_scale.errors import ConfigError
    from llava_scale.serving.batch import answer_file

    if overwrite and source.exists() and target.exists() and source.samefile(target):
        raise ConfigError(f"{target} is the input too; choose another file for the answers")
    engine = load_engine(checkpoint, device, dtype)
    if overwrite:
        target.unlink(missing_ok=True)
    with progress() as show:
        outcome = answer_file(
            engine,
            source,
            target,
            model_name=str(checkpoint),
            media_root=media_root,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            on_progress=lambda done, total: show("answers", done, total),
        )
    kept = f", {outcome.num_kept:,} were there already" if outcome.num_kept else ""
    typer.echo(f"{outcome.num_answered:,} of {outcome.num_lines:,} lines answered{kept}: {target}")
    for number, reason in outcome.errors[:_SHOWN]:
        typer.echo(f"line {number}: {reason}", err=True)
    if outcome.errors:
        typer.echo(f"{len(outcome.errors):,} lines have errors (--allow-bad {allow_bad})", err=True)
    if len(outcome.errors) > allow_bad:
        raise typer.Exit(1)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, to be compared.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and the curves as PNG.")],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "",
) -> None:
    """Curves, scores, settings and answers of runs beside each other, as one HTML page and PNG files.

    Scores and answers come from eval.json in the run folder or its eval/ folder (llava-scale eval --out RUN/eval).
    """
    from llava_scale.viz.report import write_report

    typer.echo(f"written: {write_report(runs, out, title=title)}")
