"""What features computed ahead save: the same steps of stage ``align`` with a frozen CLIP tower and without it.

Pictures are JPEGs made on the spot, weights are random: a tower of ViT-B/16's shape, a language model of SmolLM2's
width. Losses of both runs are compared as well.

    python benchmarks/train_precompute.py --steps 4
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig

from llava_scale.config.load import parse_config
from llava_scale.model import LlavaScaleConfig, LlavaScaleForConditionalGeneration
from llava_scale.model.presets import tiny_tokenizer
from llava_scale.model.processing import LlavaScaleProcessor
from llava_scale.training.precompute import precompute
from llava_scale.training.trainer import train
from llava_scale.types import PLACEHOLDERS


def write_shard(folder: Path, count: int) -> Path:
    """Captions of pictures, as one tar."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "shard-00000.tar", "w") as tar:
        for number in range(count):
            blocks = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(blocks).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"a picture of {number} things"}]
            record = json.dumps({"id": str(number), "conversations": turns}).encode()
            for name, data in ((f"{number:05d}.json", record), (f"{number:05d}.jpg", buffer.getvalue())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def write_model(folder: Path, layers: int) -> Path:
    """A checkpoint with random weights."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(PLACEHOLDERS.values())})
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    config = LlavaScaleConfig(text_config=text, vision_config=CLIPVisionConfig(patch_size=16), image_size=224)
    for kind, token in PLACEHOLDERS.items():
        setattr(config, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))
    torch.manual_seed(0)
    model = LlavaScaleForConditionalGeneration(config)
    model.save_pretrained(folder)
    LlavaScaleProcessor.for_model(model, tokenizer).save_pretrained(folder)
    return folder


def measure(tree: dict[str, Any], name: str, features: str = "") -> tuple[list[float], list[float]]:
    """Losses and processor seconds of each step."""
    tree = json.loads(json.dumps(tree))
    tree["data"]["features"] = features
    tree["train"]["output_dir"] += name
    losses: list[float] = []
    marks: list[float] = []

    def on_log(line: dict[str, Any]) -> None:
        if "lr" in line:
            losses.append(line["loss"])
            marks.append(time.process_time())

    train(parse_config(tree, origin="benchmark"), on_log=on_log)
    return losses, [after - before for before, after in pairwise(marks)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="samples of a step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree: dict[str, Any] = {
            "model": {"init_from": str(write_model(folder / "model", options.layers))},
            "data": {
                "sources": [{"path": str(write_shard(folder / "shards", options.samples * options.steps))}],
                "packing": {"mode": "samples", "samples_per_row": options.samples},
                "num_workers": 0,
                "cache_dir": str(folder / "cache"),
            },
            "train": {
                "output_dir": str(folder / "run"),
                "stage": "align",
                "steps": options.steps,
                "log_every": 1,
                "save_every": 0,
                "precision": "fp32",
                "learning_rate": 1e-3,
            },
        }
        plain, slow = measure(tree, "-plain")
        started = time.process_time()
        done = precompute(parse_config(tree, origin="benchmark"), folder / "features")
        cost = time.process_time() - started
        stored, fast = measure(tree, "-stored", str(folder / "features"))
    result = {
        "seconds_a_step": sorted(slow)[len(slow) // 2],
        "seconds_a_step_stored": sorted(fast)[len(fast) // 2],
        "gain": [round(a / b, 2) for a, b in zip(slow, fast, strict=True)],
        "precompute_seconds_a_picture": cost / done.num_media,
        "megabytes_a_picture": done.num_bytes / done.num_media / 1e6,
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(plain, stored, strict=True)),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
