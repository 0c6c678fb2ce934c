"""What a run is about to do, and what it did."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from llava_scale.config import Config, TrainConfig
    from llava_scale.training.recipe import ModuleSummary, Recipe

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Expected memory in GiB.

    Attributes:
        weights: All parameters.
        training: Gradients and optimizer state of the trained ones; exact.
        activations: Language model's activations and logits of one full row whose every token is supervised; an
            upper bound in practice (measured on CPU: 0.6 to 0.9 of it). 0 where the length of a row is not known.
    """

    weights: float
    training: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.training + self.activations


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Opening of a run.

    Attributes:
        name: The run's name.
        stage: Stage of the recipe.
        device: Where it trains, in words.
        precision: Type of the matrix work.
        modules: What is trained of each module.
        num_samples: Training samples.
        start_step: Steps that a resumed run has behind it.
        total_steps: Steps of the whole run.
        epochs: Passes over the training samples that these steps make.
        step_size: What one step works on, in words.
        memory: Expected memory.
        output_dir: Run folder.
    """

    name: str
    stage: str
    device: str
    precision: str
    modules: tuple[ModuleSummary, ...]
    num_samples: int
    start_step: int
    total_steps: int
    epochs: float
    step_size: str
    memory: MemoryEstimate
    output_dir: Path


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """End of a run.

    Attributes:
        output_dir: Run folder.
        steps: Finished optimizer steps.
        total_steps: Steps of the whole run.
        loss: Loss of the last line of the log; None if there is none.
        evaluation: Last held-out evaluation: ``eval/loss`` and whatever the callback returned.
        seconds: Time in training steps, over all parts of a resumed run.
        samples: Samples trained on.
        text_tokens: Their text tokens.
        visual_tokens: Their visual tokens.
        skipped: Samples that could not be used.
        bad_steps: Steps left out because loss or gradient was not finite.
        checkpoint: Newest checkpoint.
        final_dir: Folder for ``from_pretrained``; None if the run was stopped before its end.
        stopped_by: Number of the signal that stopped the run, or None.
        stop_exit_code: Exit code for it; 0 is 128 plus the signal.
    """

    output_dir: Path
    steps: int
    total_steps: int
    loss: float | None
    evaluation: dict[str, Any] = field(default_factory=dict)
    seconds: float
    samples: int
    text_tokens: int
    visual_tokens: int
    skipped: int
    bad_steps: int
    checkpoint: Path | None
    final_dir: Path | None
    stopped_by: int | None
    stop_exit_code: int = 0

    @property
    def exit_code(self) -> int:
        """What a shell expects: 0, or 128 plus the signal; what a scheduler requeues on, where the config names it."""
        if self.stopped_by is None:
            return 0
        requeue = self.stop_exit_code and self.stopped_by != signal.SIGINT
        return self.stop_exit_code if requeue else 128 + self.stopped_by

    @property
    def next_command(self) -> str:
        """What to type next."""
        if self.final_dir is None:
            return f"llava-scale train {self.output_dir / 'config.yaml'} --resume"
        return f"llava-scale chat {self.final_dir} --image PICTURE 'QUESTION'"


def summarize(
    config: Config, *, model: nn.Module, recipe: Recipe, device: str, precision: str, num_samples: int,
    start_step: int, total_steps: int, steps_per_epoch: float, output_dir: Path, num_ranks: int = 1,
) -> RunSummary:  # fmt: skip
    """Return the opening summary of a run that is ready to start."""
    packing, rows = config.data.packing, config.train.rows_per_step
    by_tokens = packing.mode == "tokens"
    size = f"{packing.row_length:,} tokens" if by_tokens else f"{packing.samples_per_row:,} samples"
    shared = f" over {num_ranks} processes ({config.train.parallel.strategy})" if num_ranks > 1 else ""
    full = f" = {rows * packing.row_length:,} tokens at most" if by_tokens and rows > 1 else ""
    return RunSummary(
        name=config.name,
        stage=config.train.stage,
        device=device,
        precision=precision,
        modules=recipe.modules,
        num_samples=num_samples,
        start_step=start_step,
        total_steps=total_steps,
        epochs=total_steps / steps_per_epoch if steps_per_epoch else 0.0,
        step_size=f"{rows} row{'s' if rows > 1 else ''} of {size}{full}{shared}",
        memory=estimate_memory(
            model, config.train, precision=precision, row_tokens=packing.row_length if by_tokens else 0
        ),
        output_dir=output_dir,
    )


def estimate_memory(model: nn.Module, config: TrainConfig, *, precision: str, row_tokens: int) -> MemoryEstimate:
    """Estimate what training ``model`` takes; ``row_tokens`` is the length of a full row, 0 if unknown."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters() if parameter.requires_grad
    )
    activations = row_tokens * _activation_bytes_per_token(model, config, precision)
    logits = min(config.loss_chunk, row_tokens) * _text_value(model, "vocab_size") * 4 * 3
    return MemoryEstimate(
        weights=weights / _GIB,
        training=3 * trained / _GIB,  # gradient and AdamW's two moments
        activations=(activations + logits) / _GIB,
    )


def _activation_bytes_per_token(model: nn.Module, config: TrainConfig, precision: str) -> int:
    """Bytes that the language model's layers hold for the backward pass, per token of a row.

    A layer keeps about 12 vectors of its width (norms in float32, queries, keys, values, attention's output, the
    residual stream) and 3 of its inner width; recomputing keeps the residual stream only, and one layer at a time.
    """
    layers, width = _text_value(model, "num_hidden_layers"), _text_value(model, "hidden_size")
    inner = _text_value(model, "intermediate_size")
    layer = (12 * width + 3 * inner) * (2 if precision == "bf16" else 4)
    return layers * width * 4 + layer if config.gradient_checkpointing else layers * layer


def _text_value(model: nn.Module, name: str) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, name, 0) or 0)
