"""``llava-scale quickstart``: the main job from nothing to an answered question, on synthetic data."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava_scale.cli.processes import run_in_processes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llava_scale.config import Config

RECIPE = Path(__file__).with_name("quickstart.yaml")
MODALITIES = ("image", "text", "video", "audio", "video_audio")
_NUM_SHOWN = 2  # questions of each modality


def register(app: typer.Typer) -> None:
    """Add ``quickstart`` to ``app``."""
    app.command()(quickstart)


def quickstart(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win.")] = None,
    out: Annotated[Path, typer.Option(help="Run folder; what is there already is used again.")] = Path(
        "runs/quickstart"
    ),
    num_samples: Annotated[int, typer.Option(min=1, help="Training samples.")] = 29_000,
    num_test: Annotated[int, typer.Option(min=1, help="Test samples.")] = 1_500,
) -> None:
    """Make synthetic data, pack it, train, evaluate on held-out data, answer questions and write a report.

    Pictures, videos, sounds, videos with sound, and text alone.
    """
    from llava_scale.config import load_config

    train_shards, test_shards = out / "shards" / "train", out / "shards" / "test"
    config = load_config(
        RECIPE,
        [
            f"train.output_dir={json.dumps(str(out / 'train'))}",
            f"data.sources=[{{path: {json.dumps(str(train_shards))}}}]",
            f"data.eval_sources=[{{path: {json.dumps(str(test_shards))}}}]",
            *(overrides or []),
        ],
    )
    stages = _Stages(out)
    toy = {"num_samples": num_samples, "num_test": num_test, "seed": config.seed}
    stages.run(
        "data", "make synthetic pictures, videos, sounds and questions", toy, lambda: _make_data(out / "toy", toy)
    )
    stages.run("pack", "pack them into shards", toy, lambda: _pack(out / "toy", train_shards, test_shards))
    settings = {**toy, "config": _matters(config)}
    stages.run("train", "train the tiny model", settings, lambda: _train(config))
    stages.run("eval", "ask held-out questions", settings, lambda: _evaluate(config, test_shards))
    stages.run("answers", "answer a few questions", settings, lambda: _answer(config, out))
    _finish(config, out, stages)


@dataclass(slots=True)
class _Stages:
    """Runs each stage once for the same inputs, and remembers how long it took."""

    out: Path
    seconds: dict[str, float] = field(default_factory=dict)
    number: int = 0

    def run(self, name: str, title: str, inputs: dict[str, Any], work: Callable[[], None]) -> None:
        """Do ``work`` unless it was done for these ``inputs``; a stage that is redone makes later ones stale."""
        self.number += 1
        marker = self.out / f".{name}.done"
        digest = hashlib.sha256(json.dumps([inputs, self._before()], sort_keys=True).encode()).hexdigest()
        known = json.loads(marker.read_text()) if marker.exists() else {}
        reused = known.get("inputs") == digest
        typer.secho(f"\n[{self.number}/6] {title}" + (" (done before)" if reused else ""), bold=True)
        if reused:
            self.seconds[name] = known["seconds"]
            return
        started = time.perf_counter()
        work()
        self.seconds[name] = round(time.perf_counter() - started, 2)
        self.out.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"inputs": digest, "seconds": self.seconds[name]}))

    def _before(self) -> list[str]:
        """What earlier stages were made from."""
        return [
            json.loads(path.read_text())["inputs"]
            for name in self.seconds
            if (path := self.out / f".{name}.done").exists()
        ]


def _matters(config: Config) -> dict[str, Any]:
    """The settings, without the folder that the run happens to lie in."""
    from llava_scale.config import to_dict

    tree = to_dict(config)
    for section, key in (("train", "output_dir"), ("data", "sources"), ("data", "eval_sources")):
        tree[section].pop(key)
    return tree


def _make_data(folder: Path, settings: dict[str, int]) -> None:
    from llava_scale.data.toy.samples import write_toy

    result = write_toy(folder, **settings, modalities=MODALITIES, workers=os.cpu_count() or 1)
    typer.echo(f"{result.num_train:,} training and {result.num_test:,} test conversations in {folder}")


def _pack(toy: Path, train_shards: Path, test_shards: Path) -> None:
    from llava_scale.cli.data import pack

    for name, shards in (("train", train_shards), ("test", test_shards)):
        pack(toy / f"{name}.json", shards, media_root=toy, overwrite=True)


def _train(config: Config) -> None:
    """Train, or go on with a training of the same settings that was cut off."""
    from llava_scale.config import to_yaml

    folder = Path(config.train.output_dir)
    saved = folder / "config.yaml"
    unfinished = saved.exists() and not (folder / "final").exists() and _same_settings(config, saved)
    if folder.exists() and not unfinished:
        shutil.rmtree(folder)  # an earlier quickstart with other settings
    recipe = folder.with_name(f"{folder.name}.yaml")
    recipe.write_text(to_yaml(config), encoding="utf-8")
    code = run_in_processes(["train", str(recipe), *(["--resume"] if unfinished else [])], _num_processes(config))
    if code:
        raise typer.Exit(code)


def _num_processes(config: Config) -> int:
    """One for each core on a CPU, as far as rows can be shared: kernels of a small model gain little from threads."""
    import torch

    if torch.cuda.is_available():
        return 1
    cores, rows = len(os.sched_getaffinity(0)), config.train.rows_per_step
    return max(number for number in range(1, cores + 1) if rows % number == 0)


def _same_settings(config: Config, saved: Path) -> bool:
    from llava_scale.config import load_config

    return _matters(load_config(saved)) == _matters(config)


def _evaluate(config: Config, shards: Path) -> None:
    from llava_scale.cli.eval_data import DataOptions, evaluate_data

    folder = Path(config.train.output_dir)
    processes = _num_processes(config)
    options = DataOptions(
        data=str(shards), out=folder / "eval", batch_size=64, shuffle_frames=True, device="cpu", processes=processes
    )
    evaluate_data(folder / "final", options)


def _answer(config: Config, out: Path) -> None:
    """Ask about a few test samples as a user would, and keep what was said."""
    from llava_scale.serving.engine import GenerationRequest, load_engine
    from llava_scale.types import MEDIA_KINDS, Turn

    asked = _some_questions(json.loads((out / "toy" / "test.json").read_text(encoding="utf-8")))
    files = [
        {kind: tuple(str(out / "toy" / name) for name in record.get(kind, ())) for kind in MEDIA_KINDS}
        for record in asked
    ]
    requests = [
        GenerationRequest(
            turns=(Turn("user", record["conversations"][0]["value"]),),
            media=media,
            video_audio=bool(record.get("video_audio")),
        )
        for record, media in zip(asked, files, strict=True)
    ]
    engine = load_engine(Path(config.train.output_dir) / "final", device="cpu")
    lines = []
    for record, media, answer in zip(asked, files, engine.generate(requests, max_new_tokens=48), strict=True):
        question, gold = (turn["value"] for turn in record["conversations"][:2])
        shown = question.rpartition(">\n")[2]
        names = [name for kind in MEDIA_KINDS for name in media[kind]]
        lines.append({"media": names, "question": shown, "answer": answer, "right_answer": gold})
        typer.echo(f"{', '.join(names) or '(text alone)'}\n  {shown}  ->  {answer}   (right: {gold})")
    (out / "answers.json").write_text(json.dumps(lines, indent=1), encoding="utf-8")


def _some_questions(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first single questions about each combination of media, of different skills."""
    chosen: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for record in records:
        media = tuple(kind for kind in MODALITIES if record.get(kind))
        known = chosen.setdefault(media, {})
        if len(record["conversations"]) == 2 and len(known) < _NUM_SHOWN:
            known.setdefault(record["task"], record)
    return [record for known in chosen.values() for record in known.values()]


def _of_order(shares: dict[str, Any]) -> float:
    """Share of right answers to the questions about videos that need the order of frames."""
    from llava_scale.data.toy.clips import ORDER_TASKS

    of_order = [shares[task] for task in ORDER_TASKS if task in shares]
    total = sum(share["total"] for share in of_order)
    return sum(share["correct"] for share in of_order) / total if total else 0.0


def _finish(config: Config, out: Path, stages: _Stages) -> None:
    """Write ``summary.json`` and the report, and print the table that says how good the model is."""
    from rich.console import Console
    from rich.table import Table

    from llava_scale.viz.report import write_report

    run = Path(config.train.output_dir)
    result = json.loads((run / "eval" / "eval.json").read_text(encoding="utf-8"))
    shares = ("exact_match", "blind", "blind_model")
    summary = {name: {group: share["value"] for group, share in result[name].items()} for name in shares}
    names = {"right": "by_task", "frames_shuffled": "shuffled_frames_by_task"}
    summary["video_order"] = {name: _of_order(result[field]) for name, field in names.items()}
    seconds = {**stages.seconds, "total": round(sum(stages.seconds.values()), 2)}
    written = json.dumps({**summary, "loss": result["loss"], "seconds": seconds}, indent=1)
    for folder in (out, run):
        (folder / "summary.json").write_text(written + "\n", encoding="utf-8")
    typer.secho("\n[6/6] report", bold=True)
    page = write_report([run], out, title="Quickstart")
    table = Table("held-out questions", "exact match", "blind", "blind model", title="llava-scale quickstart")
    for group, value in summary["exact_match"].items():
        blinds = [summary[name].get(group) for name in shares[1:]]
        table.add_row(group, f"{value:.1%}", *("" if value is None else f"{value:.1%}" for value in blinds))
    console = Console()
    console.print(table)
    typer.echo(
        "blind: the most frequent answer to such a question; blind model: this model with plain pictures and silence\n"
        "questions about the order of events in videos: {right:.1%}, with frames shuffled {frames_shuffled:.1%}".format(
            **summary["video_order"]
        )
    )
    typer.echo(", ".join(f"{name} {value:,.0f} s" for name, value in seconds.items()))
    typer.echo(f"report   {page}\nsummary  {out / 'summary.json'}")
    typer.echo(f"next     llava-scale chat {run / 'final'} --image PICTURE 'QUESTION'")
