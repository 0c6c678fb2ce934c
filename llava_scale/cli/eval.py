"""``llava-scale eval``: how good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_scale.cli.common import Checkpoint, Device, Dtype, DtypeOption, load_engine, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava_scale.errors import SampleError
    from llava_scale.eval.metrics import Share
    from llava_scale.eval.result import EvalResult
    from llava_scale.eval.tasks import Generate, Question
    from llava_scale.serving.engine import Engine

_SHOWN = 10  # bad samples on the terminal


def register(app: typer.Typer) -> None:
    """Add ``eval`` to ``app``."""
    app.command(name="eval")(evaluate)


def evaluate(
    checkpoint: Checkpoint,
    more_tasks: Annotated[list[Path] | None, typer.Argument(metavar="[TASK.yaml]...", help="As --tasks.")] = None,
    tasks: Annotated[list[Path] | None, typer.Option(help="Task files (YAML); further ones may follow it.")] = None,
    data: Annotated[str, typer.Option(help="Folder or URL of held-out shards: loss, exact match, ranking.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Most samples, spread evenly; 0 takes all.")] = 0,
    ranking: Annotated[int, typer.Option(min=0, help="Rank each caption among this many; 0 ranks none.")] = 0,
    ranking_task: Annotated[str, typer.Option(help="Rank samples whose 'task' is this.")] = "caption",
    blind_model: Annotated[bool, typer.Option(help="Also ask with plain pictures: what text alone gives.")] = True,
    shuffle_frames: Annotated[bool, typer.Option(help="Also ask with the frames of videos in another order.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for eval.json and eval.html.")] = None,
    num_examples: Annotated[int, typer.Option("--examples", min=0, help="Answers kept with their pictures.")] = 48,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 16,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the tasks on this machine.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask again what OUT/answers holds already.")] = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Scores of a model: by task files, or held-out loss, exact match and caption ranking on packed data (--data).

    Task answers are kept in OUT/answers: an evaluation that was cut off goes on where it was. Several processes:
    --processes N, or torchrun --nproc-per-node N --no-python llava-scale eval CHECKPOINT --tasks TASK.yaml
    """
    from llava_scale.errors import ConfigError

    chosen = [*(tasks or ()), *(more_tasks or ())]
    if bool(chosen) == bool(data):
        raise ConfigError("give either task files (--tasks a.yaml b.yaml) or shards (--data)")
    if chosen:
        from llava_scale.cli.eval_tasks import TaskOptions, evaluate_tasks

        options = TaskOptions(
            out=out, batch_size=batch_size, processes=processes, fresh=fresh, device=device, dtype=dtype.value
        )
        evaluate_tasks(checkpoint, chosen, options)
        return
    if processes > 1:
        raise ConfigError("--processes is for task files (--tasks)")
    from llava_scale.data.dataset import open_dataset
    from llava_scale.eval.result import write_result
    from llava_scale.eval.runner import EvalSettings
    from llava_scale.eval.runner import evaluate as run_evaluation
    from llava_scale.viz.scores import write_evaluation_page

    settings = EvalSettings(
        limit=limit,
        blind_model=blind_model,
        shuffle_frames=shuffle_frames,
        ranking=ranking,
        ranking_task=ranking_task,
        num_examples=num_examples,
    )
    dataset = open_dataset(data)
    engine = load_engine(checkpoint, device, dtype)
    with progress() as show:
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


def asking(engine: Engine, *, max_new_tokens: int = 64, batch_size: int = 16) -> Generate:
    """Return the way in which ``eval`` asks ``engine``: greedily, in batches."""
    from llava_scale.serving.engine import GenerationRequest

    def generate(questions: Sequence[Question]) -> Sequence[str | SampleError]:
        requests = [
            GenerationRequest(turns=question.turns, media=question.media, change=question.change)
            for question in questions
        ]
        return engine.try_generate(requests, max_new_tokens=max_new_tokens, batch_size=batch_size)

    return generate


def print_scores(result: EvalResult) -> None:
    """Print the scores of an evaluation as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if result.exact_match["overall"].total:
        others = [(result.blind, result.blind_by_task), (result.blind_model, result.blind_model_by_task)]
        names = ["blind", "blind model"]
        if result.shuffled_frames:
            others.append((result.shuffled_frames, result.shuffled_frames_by_task))
            names.append("frames shuffled")
        table = Table("", "questions", "exact match", "95 % interval", *names)
        for group, share in result.exact_match.items():
            table.add_row(*_score_cells(group, share, [shares.get(group) for shares, _ in others]))
        table.add_section()
        for group, share in result.by_task.items():
            table.add_row(*_score_cells(group, share, [shares.get(group) for _, shares in others]))
        console.print(table)
        typer.echo(
            "blind: most frequent answer to such a question; blind model: this one with plain pictures and silence"
        )
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


def _score_cells(group: str, share: Share, others: Sequence[Share | None]) -> list[str]:
    low, high = share.interval
    cells = ["" if other is None else f"{other.value:.1%}" for other in others]
    return [group, f"{share.total:,}", f"{share.value:.1%}", f"{low:.1%} to {high:.1%}", *cells]
