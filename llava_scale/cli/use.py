"""``llava-scale chat | run | eval | report``: use a trained model and see how good it is."""

from __future__ import annotations

import enum
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.progress import TaskID

    from llava_scale.errors import SampleError
    from llava_scale.eval.metrics import Share
    from llava_scale.eval.result import EvalResult
    from llava_scale.eval.tasks import Generate, Question
    from llava_scale.serving.engine import Engine


class Dtype(str, enum.Enum):
    """Type of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_SHOWN = 10  # bad lines and samples on the terminal

Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a model, such as RUN/final.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of the weights; auto keeps the one they were saved in.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command()(chat)
    app.command()(run)
    app.command(name="eval")(evaluate)
    app.command()(report)


def chat(
    checkpoint: Checkpoint,
    question: Annotated[str | None, typer.Argument(help="Answered at once; without it a conversation begins.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Picture to ask about; may be given several times.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawn answers repeatable.")] = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Ask a model about pictures: one question, or a conversation in the terminal."""
    from llava_scale.cli.terminal_chat import answer_once, talk
    from llava_scale.serving.chat import AnswerSettings, ChatSession
    from llava_scale.serving.sampling import Sampling

    Sampling(temperature=temperature, top_p=top_p, seed=seed)  # refuses before the model is loaded
    settings = AnswerSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    session = ChatSession(_load(checkpoint, device, dtype), settings)
    for path in image or ():
        session.add_image(path)
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

    A line of IN: {"id": ..., "image": "a.jpg" or ["a.jpg", "b.jpg"], "question": "..."}, or "conversations" as in
    LLaVA's JSON, ending with a human turn. OUT repeats it with "answer" or "error".
    """
    from llava_scale.errors import ConfigError
    from llava_scale.serving.batch import answer_file

    if overwrite and source.exists() and target.exists() and source.samefile(target):
        raise ConfigError(f"{target} is the input too; choose another file for the answers")
    engine = _load(checkpoint, device, dtype)
    if overwrite:
        target.unlink(missing_ok=True)
    with _progress() as show:
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


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="Folder or URL of held-out shards.")],
    limit: Annotated[int, typer.Option(min=0, help="Most samples, spread evenly; 0 takes all.")] = 0,
    ranking: Annotated[int, typer.Option(min=0, help="Rank each caption among this many; 0 ranks none.")] = 0,
    ranking_task: Annotated[str, typer.Option(help="Rank samples whose 'task' is this.")] = "caption",
    blind_model: Annotated[bool, typer.Option(help="Also ask with plain pictures: what text alone gives.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder for eval.json and eval.html.")] = None,
    num_examples: Annotated[int, typer.Option("--examples", min=0, help="Answers kept with their pictures.")] = 48,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 16,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Held-out loss, exact match beside blind scores, and caption ranking of a model on packed data."""
    from llava_scale.data.dataset import open_dataset
    from llava_scale.eval.result import write_result
    from llava_scale.eval.runner import EvalSettings
    from llava_scale.eval.runner import evaluate as run_evaluation
    from llava_scale.viz.scores import write_evaluation_page

    settings = EvalSettings(
        limit=limit, blind_model=blind_model, ranking=ranking, ranking_task=ranking_task, num_examples=num_examples
    )
    dataset = open_dataset(data)
    engine = _load(checkpoint, device, dtype)
    with _progress() as show:
        result = run_evaluation(
            engine.model,
            engine.processor,
            dataset,
            asking(engine, max_new_tokens=max_new_tokens, batch_size=batch_size),
            checkpoint=str(checkpoint),
            settings=settings,
            on_progress=show,
        )
    print_scores(result)
    if out is not None:
        write_result(result, out)
        typer.echo(f"written: {out / 'eval.json'}, {write_evaluation_page(out)}")


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


def asking(engine: Engine, *, max_new_tokens: int = 64, batch_size: int = 16) -> Generate:
    """Return the way in which ``eval`` asks ``engine``: greedily, in batches."""
    from llava_scale.serving.engine import GenerationRequest

    def generate(questions: Sequence[Question]) -> Sequence[str | SampleError]:
        requests = [GenerationRequest(turns=question.turns, media=question.media) for question in questions]
        return engine.try_generate(requests, max_new_tokens=max_new_tokens, batch_size=batch_size)

    return generate


def print_scores(result: EvalResult) -> None:
    """Print the scores of an evaluation as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if result.exact_match["overall"].total:
        table = Table("", "questions", "exact match", "95 % interval", "blind", "blind model")
        for group, share in result.exact_match.items():
            blind, blind_model = result.blind.get(group), result.blind_model.get(group)
            table.add_row(*_score_cells(group, share, blind, blind_model))
        table.add_section()
        for group, share in result.by_task.items():
            blind, blind_model = result.blind_by_task.get(group), result.blind_model_by_task.get(group)
            table.add_row(*_score_cells(group, share, blind, blind_model))
        console.print(table)
        typer.echo("blind: most frequent answer to such a question; blind model: this one with plain pictures")
    typer.echo(f"{result.num_samples:,} samples of {result.data}")
    if result.loss is not None:
        typer.echo(f"held-out loss {result.loss:.4f} nats a token ({result.num_supervised:,} supervised tokens)")
    if result.ranking is not None:
        ranking = result.ranking
        for name, first, fifth in (
            ("mean", ranking.top1, ranking.top5),
            ("sum", ranking.sum_top1, ranking.sum_top5),
        ):
            typer.echo(
                f"caption ranking by the {name} over tokens, {ranking.num_samples:,} pictures among "
                f"{ranking.num_candidates:,}: top 1 {first.value:.1%}, top 5 {fifth.value:.1%} "
                f"(chance {ranking.chance(1):.1%}, {ranking.chance(5):.1%})"
            )
    for item in result.skipped[:_SHOWN]:
        typer.echo(f"left out: {item.shard}: {item.key}: {item.reason}", err=True)
    if result.skipped:
        typer.echo(f"{len(result.skipped):,} samples or questions left out", err=True)


def _score_cells(group: str, share: Share, blind: Share | None, blind_model: Share | None) -> list[str]:
    low, high = share.interval
    others = ["" if other is None else f"{other.value:.1%}" for other in (blind, blind_model)]
    return [group, f"{share.total:,}", f"{share.value:.1%}", f"{low:.1%} to {high:.1%}", *others]


def _load(checkpoint: Path, device: str, dtype: Dtype) -> Engine:
    from transformers.utils.logging import disable_progress_bar

    from llava_scale.serving.engine import load_engine

    disable_progress_bar()
    return load_engine(checkpoint, device=device, dtype=dtype.value)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show named bars on the terminal; yields a function of (name, done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:

        def show(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done, total=total)

        yield show
