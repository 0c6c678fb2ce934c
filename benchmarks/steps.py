"""Training steps of our model and of transformers' LLaVA, on the same samples with the same weights.

Weights are random, of SmolLM2's shape with a small CLIP tower; samples are drawn by length only.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llava_scale.config import TrainConfig
from llava_scale.model import LlavaScaleConfig, LlavaScaleForConditionalGeneration, row_inputs
from llava_scale.training.engine import blocks_of
from llava_scale.training.optim import build_optimizer, clip_gradients, set_learning_rates, step_where
from llava_scale.training.recipe import apply_recipe, plan_recipe
from llava_scale.types import IGNORE_INDEX, PackedRow

IMAGE = 336
"""Side of pictures."""
LAYERS, VOCABULARY = 30, 49_152
"""Of SmolLM2-135M; with fewer layers the vocabulary shrinks alike, so that the head keeps its share of the work."""

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


def image_token(layers: int) -> int:
    """Id of the placeholder, the last but 63 of the vocabulary."""
    return VOCABULARY * layers // LAYERS


def draw_samples(options: argparse.Namespace, mix: str, count: int, seed: int = 0) -> list[Sample]:
    """``count`` samples of a mix."""
    picture_tokens, placeholder = options.visual_tokens, image_token(options.layers)
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        prompt, answer, with_picture = MIXES[mix](draw)
        text = torch.randint(10, placeholder, (prompt + answer,), generator=draw)
        labels = torch.cat([torch.full((prompt,), IGNORE_INDEX), text[prompt:]])
        pixels = None
        if with_picture:
            pixels = torch.randint(0, 256, (3, IMAGE, IMAGE), generator=draw, dtype=torch.uint8)
            text = torch.cat([torch.full((picture_tokens,), placeholder), text])
            labels = torch.cat([torch.full((picture_tokens,), IGNORE_INDEX), labels])
        samples.append(Sample(text, labels, pixels))
    return samples


def pack(samples: list[Sample]) -> PackedRow:
    """The samples as one packed row."""
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    pictures = [sample.pixels for sample in samples if sample.pixels is not None]
    with_picture = next((sample for sample in samples if sample.pixels is not None), samples[0])
    of_picture = int((with_picture.ids == with_picture.ids[0]).sum())
    return PackedRow(
        input_ids=torch.cat([sample.ids for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        position_ids=torch.cat([torch.arange(int(length)) for length in lengths]),
        cu_seq_lens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        pixel_values=torch.stack(pictures) if pictures else None,
        image_num_tokens=(of_picture,) * len(pictures),
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


def make_configs(options: argparse.Namespace) -> tuple[Any, Any]:
    """Configs of the language model and of the tower."""
    from transformers import CLIPVisionConfig, LlamaConfig

    text = LlamaConfig(
        vocab_size=image_token(options.layers) + 64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
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
        patch_size=IMAGE // int(options.visual_tokens**0.5),
    )
    return text, vision


def make_theirs(options: argparse.Namespace) -> Any:
    """LLaVA of transformers with a frozen tower."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text, vision = make_configs(options)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=image_token(options.layers))
    model = LlavaForConditionalGeneration(config).train()
    for name, parameter in model.named_parameters():
        frozen = "vision_tower" in name or (options.projector_only and "multi_modal_projector" not in name)
        parameter.requires_grad_(not frozen)
    return model


def our_config(options: argparse.Namespace) -> LlavaScaleConfig:
    """Config of our model."""
    text, vision = make_configs(options)
    config = LlavaScaleConfig(text_config=text, vision_config=vision, image_size=IMAGE, image_mean=(0.5,) * 3)
    config.image_std, config.image_token_id = (0.5,) * 3, image_token(options.layers)
    return config


def make_ours(options: argparse.Namespace, theirs: Any) -> Any:
    """Our model with the same weights."""
    model = LlavaScaleForConditionalGeneration(our_config(options))
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
    settings = TrainConfig(stage="align" if options.projector_only else "instruct", learning_rate=1e-5)
    recipe = plan_recipe(model, settings)
    apply_recipe(model, recipe)
    return model, build_optimizer(model, recipe, settings)


class Runner(Protocol):
    """Something that trains."""

    def step(self, samples: list[Sample]) -> float:
        """One update; returns the loss."""
        ...


class Ours:
    """Packed rows, loss at supervised positions, fused AdamW."""

    def __init__(self, options: argparse.Namespace, *, compiled: bool = False, checkpointing: bool = False) -> None:
        self.model, self.optimizer = make_ours(options, make_theirs(options))
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
        self.model = make_theirs(options)
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
    """Transformers' LLaVA on padded batches, through what transformers' Trainer does in one step of its loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import Trainer, TrainingArguments

        self.folder = tempfile.TemporaryDirectory()
        arguments = TrainingArguments(
            self.folder.name,
            max_steps=1000,
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
        self.trainer = Trainer(model=make_theirs(options), args=arguments, data_collator=pad)
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        self.trainer.current_gradient_accumulation_steps = 1
        prepared = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.model, self.trainer.optimizer = self.trainer.model_wrapped, _ = prepared

    def step(self, samples: list[Sample]) -> float:
        """One update; returns the loss."""
        trainer = self.trainer
        loss = trainer.training_step(self.model, trainer.data_collator(samples))
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        return float(loss)


def _lognormal(draw: torch.Generator, median: float) -> int:
    return max(4, int(median * torch.exp(0.7 * torch.randn((), generator=draw))))


def _uniform(draw: torch.Generator) -> float:
    return float(torch.rand((), generator=draw))
