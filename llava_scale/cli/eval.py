"""``llava-scale eval``: how good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_scale.cli.common import Checkpoint, Device, Dtype, DtypeOption


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
    processes: Annotated[int, typer.Option(min=1, help="Processes of this machine that share the questions.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask again what OUT/answers holds already.")] = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Scores of a model: by task files, or held-out loss, exact match and caption ranking on packed data (--data).

    Task answers are kept in OUT/answers: an evaluation that was cut off goes on where it was. Several processes:
    --processes N, or torchrun --nproc-per-node N --no-python llava-scale eval CHECKPOINT ...
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
    from llava_scale.cli.eval_data import DataOptions, evaluate_data

    evaluate_data(
        checkpoint,
        DataOptions(
            data=data,
            limit=limit,
            ranking=ranking,
            ranking_task=ranking_task,
            blind_model=blind_model,
            shuffle_frames=shuffle_frames,
            out=out,
            num_examples=num_examples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            processes=processes,
            device=device,
            dtype=dtype.value,
        ),
    )
