"""Training throughput with fewer visual tokens: one step of projector training before a frozen language model.

Random weights in the shapes of Qwen2-0.5B (24 layers, width 896) and of CLIP's ViT-B with 256 patches, or of Vicuna-7B
and ViT-L; all models share tower and language model, and see the same samples. Rounds are interleaved; times are CPU
times of one process, or seconds on a GPU:

    python benchmarks/compress_training.py
    python benchmarks/compress_training.py --device cuda --shape vicuna-7b --samples 16 --recompute --rounds 5 \\
        --only uncompressed "merging, r 0.5" "SwinQFormer, 64 queries"
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import chosen, table
from compression import Meter, ratios
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from llava_scale.config import TrainConfig
from llava_scale.model import LlavaScaleConfig, LlavaScaleForConditionalGeneration, row_inputs
from llava_scale.training.optim import build_optimizer, clip_gradients, set_learning_rates
from llava_scale.training.recipe import apply_recipe, plan_recipe, set_training_modes
from llava_scale.types import IGNORE_INDEX, PackedRow

IMAGE, PATCH, VOCABULARY, IMAGE_TOKEN = 224, 14, 32_000, 31_999
QUESTION, ANSWER = 20, 40
"""Tokens of text around a picture."""

COMPRESSORS: dict[str, dict[str, Any] | None] = {
    "uncompressed": None,
    "merging, r 0.25": {"type": "token_merging", "ratio": 0.25, "ramp": "constant"},
    "merging, r 0.5": {"type": "token_merging", "ratio": 0.5, "ramp": "constant"},
    "merging, r 0.75": {"type": "token_merging", "ratio": 0.75, "ramp": "constant"},
    "pooling 2 x 2": {"type": "pool"},
    "SwinQFormer, 64 queries": {"type": "qformer", "num_queries": 64, "window": 128, "instruction_tower": ""},
}


class Step:
    """One optimizer step of a model with its compressor.

    Args:
        options: Sizes.
        compressor: Fields of ``model.compressor``.
        shared: Tower and language model; none for the first, which makes them.
    """

    def __init__(self, options: argparse.Namespace, compressor: dict[str, Any] | None, shared: dict[str, Any]) -> None:
        text, vision = shapes(options)
        config = LlavaScaleConfig(
            text_config=text, vision_config=vision, image_size=IMAGE, compressor=compressor,
            projector={"type": "mlp2x_gelu", "input_norm": False},
        )  # fmt: skip
        config.image_token_id = IMAGE_TOKEN
        self.device, self.half = torch.device(options.device), options.precision == "bf16"
        with self.device:  # so that a large model is never on the CPU
            self.model = LlavaScaleForConditionalGeneration(config, **shared)
        if self.device.type != "cpu" and self.half:
            self.model.to(torch.bfloat16)
        if not shared:
            shared |= {"vision_tower": self.model.vision_tower, "language_model": self.model.language_model}
        settings = TrainConfig(stage="align", learning_rate=1e-3)
        recipe = plan_recipe(self.model, settings)
        apply_recipe(self.model, recipe)
        if options.recompute:
            self.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
            set_training_modes(self.model)
        self.optimizer = build_optimizer(self.model, recipe, settings)
        self.trained = [value for value in self.model.parameters() if value.requires_grad]
        self.tokens = self.model.num_visual_tokens()
        self.inputs = row_inputs(row_of(options.samples, self.tokens), device=self.device)

    def __call__(self) -> float:
        """Forward, backward, update; returns the loss."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half):
            loss = self.model(**self.inputs).loss
        loss.backward()
        clip_gradients(self.trained, 1.0)
        set_learning_rates(self.optimizer, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def shapes(options: argparse.Namespace) -> tuple[PreTrainedConfig, CLIPVisionConfig]:
    """Configs of the language model and of the tower."""
    large = options.shape == "vicuna-7b"
    if large:
        text: PreTrainedConfig = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=options.layers or 32)
    else:
        text = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=options.width,
            intermediate_size=options.width * 38 // 7,
            num_hidden_layers=options.layers or 24,
            num_attention_heads=options.width // 64,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    vision = CLIPVisionConfig(
        hidden_size=1024 if large else 768,
        intermediate_size=4096 if large else 3072,
        num_hidden_layers=options.tower_layers or (24 if large else 12),
        num_attention_heads=16 if large else 12,
        image_size=IMAGE,
        patch_size=PATCH,
    )
    return text, vision


def row_of(samples: int, tokens: int) -> PackedRow:
    """``samples`` pictures of ``tokens`` tokens each, with question and answer."""
    draw = torch.Generator().manual_seed(0)
    length = tokens + QUESTION + ANSWER
    ids = torch.randint(10, VOCABULARY - 10, (samples, length), generator=draw)
    ids[:, :tokens] = IMAGE_TOKEN
    labels = ids.clone()
    labels[:, : tokens + QUESTION] = IGNORE_INDEX
    return PackedRow(
        input_ids=ids.flatten(),
        labels=labels.flatten(),
        position_ids=torch.arange(length).repeat(samples),
        cu_seq_lens=torch.arange(0, samples * length + 1, length, dtype=torch.int32),
        pixel_values=torch.randint(0, 256, (samples, 3, IMAGE, IMAGE), generator=draw, dtype=torch.uint8),
        image_num_tokens=(tokens,) * samples,
        keys=tuple(map(str, range(samples))),
    )


def faster_precision() -> str:
    """``bf16`` where this machine multiplies matrices of these shapes faster in it than in fp32."""
    seconds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.ones(512, 896, dtype=dtype), torch.ones(4864, 896, dtype=dtype)
        trials = []
        for _ in range(8):
            start = time.process_time()
            torch.nn.functional.linear(left, right)
            trials.append(time.process_time() - start)
        seconds[name] = min(trials)
    return min(seconds, key=lambda name: seconds[name])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen2-0.5b", choices=["qwen2-0.5b", "vicuna-7b"])
    parser.add_argument("--layers", type=int, default=0, help="layers of the language model; 0 as the shape has")
    parser.add_argument("--width", type=int, default=896, help="width of the smaller shape, a multiple of 128")
    parser.add_argument("--tower-layers", type=int, default=0, help="0 as the shape has")
    parser.add_argument("--samples", type=int, default=2, help="pictures in a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--recompute", action="store_true", help="recompute the language model's activations")
    parser.add_argument("--only", nargs="+", help="names of compressors")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="auto takes the faster")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.precision == "auto":
        options.precision = faster_precision() if options.device == "cpu" else "bf16"
    meter, base = Meter(torch.device(options.device), options.rounds), "uncompressed"
    shared: dict[str, Any] = {}
    names = [base, *(name for name in chosen(COMPRESSORS, options.only) if name != base)]
    steps = {name: Step(options, COMPRESSORS[name], shared) for name in names}
    times = meter.interleaved(steps)
    lines = []
    for name, step in steps.items():
        gains = [base_s / own_s for base_s, own_s in zip(times[base], times[name], strict=True)]
        gain = f"{statistics.median(gains):.2f} ({min(gains):.2f}-{max(gains):.2f})"
        per_s = options.samples / statistics.median(times[name])
        lines.append([name, f"{step.tokens}", f"{per_s:.3f}", gain, ratios(times, name, base)])
    print(meter.place)
    count = sum(value.numel() for value in shared["language_model"].parameters()) / 1e6
    print(f"language model of {count:.0f} M parameters, {options.precision}, {options.samples} samples a step\n")
    print(table(["compressor", "tokens a picture", "samples a second", "throughput gain", "time against base"], lines))


if __name__ == "__main__":
    main()
