"""A training step: ours beside LLaVA of transformers, with its Trainer and in a plain loop.

The same samples, the same weights, the same type, one machine; real tokens a second and the memory of a step. Weights
are random, of SmolLM2's shape with a small CLIP tower; samples are drawn by length only. No data is loaded.

    python benchmarks/train_step.py --rounds 3
    python benchmarks/train_step.py --memory
    python benchmarks/train_step.py --layers 30 --mixes instruct captions --compile
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from llava_scale.config import TrainConfig
from llava_scale.model import LlavaScaleConfig, LlavaScaleForConditionalGeneration, row_inputs
from llava_scale.training.engine import blocks_of
from llava_scale.training.optim import build_optimizer, clip_gradients, set_learning_rates, step_where
from llava_scale.training.recipe import apply_recipe, plan_recipe
from llava_scale.types import IGNORE_INDEX, PackedRow

IMAGE, PATCH = 336, 28
"""Side of pictures and patches: 144 tokens a picture."""
PICTURE_TOKENS = (IMAGE // PATCH) ** 2
IMAGE_TOKEN = 49_152
VOCABULARY = 49_216

MIXES: dict[str, Callable[[torch.Generator], tuple[int, int, bool]]] = {
    "instruct": lambda draw: (_lognormal(draw, 60), _lognormal(draw, 120), _uniform(draw) < 0.8),
    "captions": lambda draw: (2, 12 + int(_uniform(draw) * 16), True),
}
"""Per mix a draw of prompt tokens, answer tokens and whether there is a picture."""


@dataclass(frozen=True)
class Sample:
    """One conversation as tokens.

    Attributes:
        ids: With a picture's tokens in their places.
        labels: The answer; ``IGNORE_INDEX`` elsewhere.
        pixels: uint8 picture, or None.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor | None


def draw_samples(mix: str, count: int, seed: int = 0) -> list[Sample]:
    """``count`` samples of a mix."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        prompt, answer, with_picture = MIXES[mix](draw)
        text = torch.randint(10, 40_000, (prompt + answer,), generator=draw)
        labels = torch.cat([torch.full((prompt,), IGNORE_INDEX), text[prompt:]])
        pixels = None
        if with_picture:
            pixels = torch.randint(0, 256, (3, IMAGE, IMAGE), generator=draw, dtype=torch.uint8)
            text = torch.cat([torch.full((PICTURE_TOKENS,), IMAGE_TOKEN), text])
            labels = torch.cat([torch.full((PICTURE_TOKENS,), IGNORE_INDEX), labels])
        samples.append(Sample(text, labels, pixels))
    return samples


def pack(samples: list[Sample]) -> PackedRow:
    """The samples as one packed row."""
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    pictures = [sample.pixels for sample in samples if sample.pixels is not None]
    return PackedRow(
        input_ids=torch.cat([sample.ids for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        position_ids=torch.cat([torch.arange(int(length)) for length in lengths]),
        cu_seq_lens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        pixel_values=torch.stack(pictures) if pictures else None,
        image_num_tokens=(PICTURE_TOKENS,) * len(pictures),
        keys=tuple(map(str, range(len(samples)))),
    )


def pad(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """The samples as transformers' users batch them: padded on the right to the longest."""
    longest = max(len(sample.ids) for sample in samples)
    batch = {
        "input_ids": torch.zeros(len(samples), longest, dtype=torch.int64),
        "attention_mask": torch.zeros(len(samples), longest, dtype=torch.int64),
        "labels": torch.full((len(samples), longest), IGNORE_INDEX),
    }
    for number, sample in enumerate(samples):
        batch["input_ids"][number, : len(sample.ids)] = sample.ids
        batch["attention_mask"][number, : len(sample.ids)] = 1
        batch["labels"][number, : len(sample.ids)] = sample.labels
    pictures = [sample.pixels for sample in samples if sample.pixels is not None]
    if pictures:
        batch["pixel_values"] = torch.stack(pictures).float() / 127.5 - 1
    return batch


def make_configs(layers: int) -> tuple[Any, Any]:
    """Configs of the language model and of the tower."""
    from transformers import CLIPVisionConfig, LlamaConfig

    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE,
        patch_size=PATCH,
    )
    return text, vision


def make_theirs(layers: int, *, projector_only: bool) -> Any:
    """LLaVA of transformers with a frozen tower."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text, vision = make_configs(layers)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    model = LlavaForConditionalGeneration(config).train()
    for name, parameter in model.named_parameters():
        frozen = "vision_tower" in name or (projector_only and "multi_modal_projector" not in name)
        parameter.requires_grad_(not frozen)
    return model


def make_ours(layers: int, theirs: Any, *, projector_only: bool) -> Any:
    """Our model with the same weights."""
    text, vision = make_configs(layers)
    config = LlavaScaleConfig(text_config=text, vision_config=vision, image_size=IMAGE, image_mean=(0.5,) * 3)
    config.image_std, config.image_token_id = (0.5,) * 3, IMAGE_TOKEN
    model = LlavaScaleForConditionalGeneration(config)
    source = theirs.model
    model.language_model.model.load_state_dict(source.language_model.state_dict())
    tower = source.vision_tower.state_dict()
    tower = {name.removeprefix("vision_model."): value for name, value in tower.items()}
    own = model.vision_tower.model
    prefix = "vision_model." if any(name.startswith("vision_model.") for name, _ in own.named_parameters()) else ""
    names = {name for name, _ in own.named_parameters()}
    own.load_state_dict({name: tower[name.removeprefix(prefix)] for name in names}, strict=False)
    linear = [module for module in model.projector.modules() if isinstance(module, torch.nn.Linear)]
    for mine, other in zip(
        linear, (source.multi_modal_projector.linear_1, source.multi_modal_projector.linear_2), strict=True
    ):
        mine.load_state_dict(other.state_dict())
    settings = TrainConfig(stage="align" if projector_only else "instruct", learning_rate=1e-5)
    recipe = plan_recipe(model, settings)
    apply_recipe(model, recipe)
    return model, build_optimizer(model, recipe, settings)


class Ours:
    """Packed rows, loss at supervised positions, fused AdamW."""

    def __init__(self, options: argparse.Namespace, *, compiled: bool = False, checkpointing: bool = False) -> None:
        theirs = make_theirs(options.layers, projector_only=options.projector_only)
        self.model, self.optimizer = make_ours(options.layers, theirs, projector_only=options.projector_only)
        self.half = options.precision == "bf16"
        self.trained = [value for value in self.model.parameters() if value.requires_grad]
        if checkpointing:
            self.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.language_model.train()
        if compiled:
            for block in blocks_of(self.model.language_model):
                block.compile(dynamic=True)

    def step(self, samples: list[Sample]) -> float:
        """One update; returns the loss."""
        row = pack(samples)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            loss = self.model(**row_inputs(row), num_items_in_batch=row.num_supervised).loss
        loss.backward()
        norm = clip_gradients(self.trained, 1.0)
        set_learning_rates(self.optimizer, 1.0)
        step_where(self.optimizer, torch.isfinite(norm))
        self.optimizer.zero_grad()
        return float(loss.detach())


class PlainLoop:
    """Transformers' LLaVA on padded batches in a loop of a few lines."""

    def __init__(self, options: argparse.Namespace, *, checkpointing: bool = False) -> None:
        self.model = make_theirs(options.layers, projector_only=options.projector_only)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.half = options.precision == "bf16"
        self.trained = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0)

    def step(self, samples: list[Sample]) -> float:
        """One update; returns the loss."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            loss = self.model(**pad(samples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class WithTrainer:
    """Transformers' LLaVA under transformers' Trainer; each call of ``step`` is a run of one step."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import Trainer, TrainingArguments

        self.folder = tempfile.TemporaryDirectory()
        arguments = TrainingArguments(
            self.folder.name,
            max_steps=1,
            bf16=options.precision == "bf16",
            use_cpu=True,
            learning_rate=1e-5,
            weight_decay=0.0,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        model = make_theirs(options.layers, projector_only=options.projector_only)
        self.trainer = Trainer(model=model, args=arguments, data_collator=pad)

    def step(self, samples: list[Sample]) -> float:
        """One update; returns the loss."""
        self.trainer.args.per_device_train_batch_size = self.trainer._train_batch_size = len(samples)
        self.trainer.train_dataset = samples
        return float(self.trainer.train().training_loss)


def runners(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is compared, by name; made when it is needed."""
    made: dict[str, Callable[[], Any]] = {
        "transformers, Trainer": lambda: WithTrainer(options),
        "transformers, loop": lambda: PlainLoop(options),
        "ours": lambda: Ours(options),
    }
    if options.compile:
        made["ours, compiled"] = lambda: Ours(options, compiled=True)
    if options.memory:
        made["transformers, loop, recomputing"] = lambda: PlainLoop(options, checkpointing=True)
        made["ours, recomputing"] = lambda: Ours(options, checkpointing=True)
    return {name: make for name, make in made.items() if not options.only or name in options.only}


def time_steps(options: argparse.Namespace, mix: str) -> dict[str, Any]:
    """Real tokens a second of each runner, interleaved; and the ratio to the plain loop round by round."""
    made = {name: make() for name, make in runners(options).items()}
    warm, *rounds = [draw_samples(mix, options.samples, seed) for seed in range(options.rounds + 1)]
    losses = {name: runner.step(warm) for name, runner in made.items()}
    if options.compile:
        made["ours, compiled"].step(rounds[0])  # lengths become symbols here
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number, samples in enumerate(rounds):
        for name in list(made) if number % 2 else reversed(list(made)):
            start = time.perf_counter()
            made[name].step(samples)
            seconds[name].append(time.perf_counter() - start)
    tokens = [sum(len(sample.ids) for sample in samples) for samples in rounds]
    padded = [len(samples) * max(len(sample.ids) for sample in samples) for samples in rounds]
    base = seconds["transformers, loop"]
    return {
        "mix": mix,
        "padding_efficiency": sum(tokens) / sum(padded),
        "first_loss": losses,
        "tokens_per_s": {name: sum(tokens) / sum(times) for name, times in seconds.items()},
        "against_loop": {
            name: [round(other / own, 2) for own, other in zip(times, base, strict=True)]
            for name, times in seconds.items()
        },
    }


def step_memory(options: argparse.Namespace, mix: str, name: str) -> float:
    """GiB that the first step adds to a process that holds model and optimizer; called in a process of its own."""
    runner = runners(options)[name]()
    samples = draw_samples(mix, options.samples)
    gc.collect()
    before = resident()
    runner.step(samples)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**30


def resident() -> float:
    """Bytes in memory now."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()


def compare_memory(options: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    """Memory of each runner and mix, each in a fresh process."""
    results = []
    for mix in options.mixes:
        found = {}
        for name in runners(options):
            command = [sys.executable, __file__, *arguments, "--one", json.dumps([mix, name])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = float(done.stdout.strip().splitlines()[-1])
        base = found.get("transformers, loop")
        ratios = {name: round(value / base, 3) for name, value in found.items()} if base else {}
        results.append({"mix": mix, "gib": found, "against_loop": ratios})
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--samples", type=int, default=6, help="samples of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30, help="layers of the language model")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--projector-only", action="store_true")
    parser.add_argument("--compile", action="store_true", help="also ours with compiled blocks")
    parser.add_argument("--memory", action="store_true", help="memory of a step instead of its time")
    parser.add_argument("--only", nargs="+", default=[], help="names of what to run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(step_memory(options, *json.loads(options.one)))
        return
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    print(platform.platform(), platform.processor(), f"{torch.get_num_threads()} threads", versions)
    if options.memory:
        results = compare_memory(options, sys.argv[1:])
    else:
        results = [time_steps(options, mix) for mix in options.mixes]
    for result in results:
        print(json.dumps(result, indent=1))


def _lognormal(draw: torch.Generator, median: float) -> int:
    return max(4, int(median * torch.exp(0.7 * torch.randn((), generator=draw))))


def _uniform(draw: torch.Generator) -> float:
    return float(torch.rand((), generator=draw))


if __name__ == "__main__":
    main()
