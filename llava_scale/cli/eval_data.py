"""``llava-scale eval --data``: held-out loss, exact match and ranking on packed data, in one process or several."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llava_scale.cli.common import Dtype, asking, load_engine, print_left_out, progress
from llava_scale.cli.processes import TIMEOUT_S, run_in_processes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava_scale.eval.metrics import Share
    from llava_scale.eval.result import EvalResult
    from llava_scale.training.parallel import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """Options of the command.

    Attributes:
        data: Folder or URL of held-out shards.
        limit: Most samples, spread evenly; 0 takes all.
        ranking: Captions to rank among; 0 ranks none.
        ranking_task: Samples whose ``task`` is this take part in the ranking.
        blind_model: Also ask with plain pictures and silence.
        shuffle_frames: Also ask with the frames of videos in another order.
        out: Folder for the result; None writes nothing.
        num_examples: Answers kept with their pictures.
        max_new_tokens: Longest answer in tokens.
        batch_size: Questions answered together.
        processes: Processes on this machine.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: Type of the weights.
    """

    data: str
    limit: int = 0
    ranking: int = 0
    ranking_task: str = "caption"
    blind_model: bool = True
    shuffle_frames: bool = False
    out: Path | None = None
    num_examples: int = 48
    max_new_tokens: int = 64
    batch_size: int = 16
    processes: int = 1
    device: str = "auto"
    dtype: str = "auto"

    def arguments(self) -> list[str]:
        """The same options as written behind the command, but for the number of processes."""
        return [
            *("--data", self.data, "--limit", str(self.limit)),
            *("--ranking", str(self.ranking), "--ranking-task", self.ranking_task),
            "--blind-model" if self.blind_model else "--no-blind-model",
            "--shuffle-frames" if self.shuffle_frames else "--no-shuffle-frames",
            *(("--out", str(self.out)) if self.out is not None else ()),
            *("--examples", str(self.num_examples), "--max-new-tokens", str(self.max_new_tokens)),
            *("--batch-size", str(self.batch_size), "--device", self.device, "--dtype", self.dtype),
        ]


def evaluate_data(checkpoint: Path, options: DataOptions) -> None:
    """Evaluate a checkpoint on packed data, print the scores, and write them into ``options.out``.

    Raises:
        ConfigError, ShardError, SampleError: as ``eval.runner.evaluate``.
    """
    if options.processes > 1 and "RANK" not in os.environ:
        code = run_in_processes(["eval", str(checkpoint), *options.arguments()], options.processes)
        if code:
            raise typer.Exit(code)
        return
    from llava_scale.training.process_group import open_ranks

    with open_ranks(os.environ, device=options.device, timeout_s=TIMEOUT_S) as ranks:
        _run(checkpoint, options, ranks)


def _run(checkpoint: Path, options: DataOptions, ranks: Ranks) -> None:
    from llava_scale.data.dataset import open_dataset
    from llava_scale.eval.result import write_result
    from llava_scale.eval.runner import EvalSettings, evaluate
    from llava_scale.viz.scores import write_evaluation_page

    settings = EvalSettings(
        limit=options.limit,
        blind_model=options.blind_model,
        shuffle_frames=options.shuffle_frames,
        ranking=options.ranking,
        ranking_task=options.ranking_task,
        num_examples=options.num_examples,
    )
    dataset = open_dataset(options.data)
    engine = load_engine(checkpoint, options.device, Dtype(options.dtype))
    with progress(shown=ranks.is_first) as show:
        result = evaluate(
            engine.model,
            engine.processor,
            dataset,
            asking(engine, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size),
            checkpoint=str(checkpoint),
            settings=settings,
            ranks=ranks,
            on_progress=show,
        )
    if not ranks.is_first:
        return
    print_scores(result)
    if options.out is not None:
        write_result(result, options.out)
        typer.echo(f"written: {options.out / 'eval.json'}, {write_evaluation_page(options.out)}")


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
    print_left_out(result.skipped)


def _score_cells(group: str, share: Share, others: Sequence[Share | None]) -> list[str]:
    low, high = share.interval
    cells = ["" if other is None else f"{other.value:.1%}" for other in others]
    return [group, f"{share.total:,}", f"{share.value:.1%}", f"{low:.1%} to {high:.1%}", *cells]
