"""Real sounds: what a small model learns from Tux Paint's sound effects and spoken words, against chance and blind.

    python examples/tuxpaint/run_sound.py --out runs/sound [KEY=VALUE ...]

Downloads, cuts clips, packs, trains everything from nothing on the CPU, and writes ``summary.json`` into the run
folder. Four numbers stand beside each score: chance, the commonest answer of training, the same model with silence (and
a blank picture) instead, and the nearest training clip by statistics of its filter bank.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fetch_parts import fetch_stamps, fetch_wheels
from sound_dataset import CHANCE, RATE, build_sounds

from llava_scale.config import load_config
from llava_scale.data.audio import AudioTransform
from llava_scale.data.dataset import open_dataset
from llava_scale.data.write import pack
from llava_scale.errors import LlavaScaleError, ShardError
from llava_scale.eval.metrics import wilson_interval
from llava_scale.serving.engine import GenerationRequest, load_engine
from llava_scale.towers.fbank import Fbank
from llava_scale.training.trackers import ConsoleTracker
from llava_scale.training.trainer import train

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava_scale.types import Sample

RECIPE = Path(__file__).with_name("sound.yaml")
Answers = dict[str, list[str]]
"""Per task the answers to its held-out questions, in order."""


def main() -> None:
    """Do what is not done yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sound"), help="folder of the run")
    parser.add_argument("--stamps", type=Path, help="folder of Tux Paint's stamps, instead of downloading them")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the recipe (sound.yaml)")
    options = parser.parse_args()
    started = time.perf_counter()
    make_data(options.stamps, options.out)
    folders = {
        "data.sources.0.path": options.out / "shards/train",
        "data.eval_sources.0.path": options.out / "shards/held_out",
        "train.output_dir": options.out / "train",
    }
    chosen = [f"{key}={json.dumps(str(path))}" for key, path in folders.items()]
    config = load_config(RECIPE, [*chosen, *options.overrides])
    result = train(config, resume=(options.out / "train/config.yaml").exists(), trackers=[ConsoleTracker()])
    if result.final_dir is None:
        print("stopped; the same command goes on from here")
        raise SystemExit(result.exit_code)
    summary = evaluate(result.final_dir, options.out / "shards")
    summary["seconds"] = round(time.perf_counter() - started, 1)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print_summary(summary)


def make_data(stamps: Path | None, out: Path) -> None:
    """Build and pack the data set unless it is there as a whole.

    Raises:
        ShardError: a record is bad.
    """
    marker = out / "data/built.json"
    if not marker.exists():
        if stamps is None:
            fetch_wheels(out / "cache")  # resvg-py, for pictures that are SVGs
            import sys

            sys.path.append(str(out / "cache/packages"))
            stamps = fetch_stamps(out / "cache")
        counts = build_sounds(stamps, out / "data")
        marker.write_text(json.dumps(counts))
    print("samples:", ", ".join(f"{name} {count}" for name, count in json.loads(marker.read_text()).items()))
    for part in ("train", "held_out"):
        packed = pack(out / f"data/{part}.json", out / "shards" / part, media_root=out / "data", workers=2)
        if packed.bad:
            raise ShardError(f"{len(packed.bad)} records of {part}.json are bad; see {packed.report}")


def evaluate(checkpoint: Path, shards: Path) -> dict[str, Any]:
    """Exact match of each task with its interval, and what it must be held against."""
    known, asked = (by_task(shards / part) for part in ("train", "held_out"))
    engine = load_engine(checkpoint)

    def answered(change: str) -> Answers:
        found = {}
        for task, samples in asked.items():
            requests = [
                GenerationRequest(
                    turns=sample.turns[:-1],
                    media={kind: [data for _, data in files] for kind, files in sample.media.items()},
                    change=change,  # type: ignore[arg-type]
                )
                for sample in samples
            ]
            found[task] = engine.generate(requests, max_new_tokens=24, batch_size=16)
        return found

    given, blind = answered(""), answered("blank")
    tasks = {}
    for task, samples in asked.items():
        truth = [answer_of(sample) for sample in samples]
        counted = Counter(answer_of(sample) for sample in known[task])
        commonest = counted.most_common(1)[0][0]
        right = matches(given[task], truth)
        low, high = wilson_interval(right, len(truth))
        tasks[task] = {
            "num": len(truth),
            "exact_match": right / len(truth),
            "interval": [low, high],
            "chance": CHANCE.get(task, 1 / len(counted)),
            "commonest_answer": matches([commonest] * len(truth), truth) / len(truth),
            "blind": matches(blind[task], truth) / len(truth),
            "nearest_clip": matches(nearest(known[task], samples), truth) / len(truth),
        }
    return {"tasks": tasks}


def by_task(shards: Path) -> dict[str, list[Sample]]:
    """The samples of a data set by their task."""
    found: dict[str, list[Sample]] = defaultdict(list)
    dataset = open_dataset(str(shards))
    for number in range(len(dataset)):
        sample = dataset.sample(number)
        found[sample.extra["task"]].append(sample)
    return dict(found)


def answer_of(sample: Sample) -> str:
    """The right answer."""
    return sample.turns[-1].text


def matches(given: Sequence[str], truth: Sequence[str]) -> int:
    """How many answers are right, case and space aside."""
    return sum(one.strip().lower() == other.lower() for one, other in zip(given, truth, strict=True))


def nearest(known: Sequence[Sample], asked: Sequence[Sample]) -> list[str]:
    """The answer of the training clip whose filter bank has the most similar mean and spread; pictures are not seen."""
    left, right = (np.stack([statistics(sample) for sample in part]) for part in (known, asked))
    centre, spread = left.mean(0), left.std(0) + 1e-6
    left, right = (left - centre) / spread, (right - centre) / spread
    distances = (right**2).sum(1)[:, None] + (left**2).sum(1) - 2 * right @ left.T
    return [answer_of(known[int(place)]) for place in distances.argmin(1)]


def statistics(sample: Sample) -> np.ndarray:
    """Mean and standard deviation of each mel band, the loudness taken out."""
    sound = AudioTransform(sample_rate=RATE)(sample.media["audio"][0][1]).data
    bands = Fbank()(torch.nn.functional.pad(sound, (0, max(0, 400 - len(sound)))))
    bands = bands - bands.mean()
    return torch.cat([bands.mean(0), bands.std(0, correction=0)]).numpy()


def print_summary(summary: dict[str, Any]) -> None:
    """One line a task."""
    print(f"\n{'task':10} {'asked':>5} {'right':>6}  {'95 % interval':14} chance commonest blind nearest clip")
    for task, row in summary["tasks"].items():
        low, high = row["interval"]
        print(
            f"{task:10} {row['num']:5} {row['exact_match']:6.1%}  {low:5.1%} - {high:5.1%}  {row['chance']:6.1%} "
            f"{row['commonest_answer']:9.1%} {row['blind']:5.1%} {row['nearest_clip']:12.1%}"
        )
    print(f"{summary['seconds'] / 60:.1f} minutes")


if __name__ == "__main__":
    try:
        main()
    except LlavaScaleError as error:
        raise SystemExit(f"error: {error}") from None
