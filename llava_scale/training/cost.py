"""What a step costs: matrix operations, counted from the layers of a model.

Counted as in the scaling papers (Kaplan et al., arXiv:2001.08361; PaLM, arXiv:2204.02311, appendix B): a weight takes
two operations a token forward, two more where the gradient passes through it, and two more where it is trained.
Recomputed activations do not count, so the share of the peak (MFU) is that of useful work. Experts that are chosen per
token are not told apart from dense layers held as plain parameters, and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

PEAK_TFLOPS = {
    "A10": 125.0,
    "A100": 312.0,
    "A800": 312.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "GH200": 989.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "L4": 121.0,
    "L40S": 362.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.0,
    "RTX 6000 Ada": 364.0,
}
"""Dense bf16 operations a second of a device, in 10^12, from the makers' data sheets (of several forms, SXM's)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much was done.

    Attributes:
        tokens: Tokens of rows, text and media.
        squares: Sum over samples of the square of their tokens.
        supervised: Tokens in the loss.
        visual: Tokens of pictures and frames in the text.
        pictures: Pictures and frames.
    """

    tokens: float
    squares: float
    supervised: float
    visual: float
    pictures: float


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Linear and convolutional weights of a part of the model.

    Attributes:
        weights: Their number.
        trained: Those that are trained.
        attention: Width of all attention layers together: heads times width, summed over layers.
        passes_gradient: Whether a gradient passes through to what lies before.
    """

    weights: int
    trained: int
    attention: int
    passes_gradient: bool

    def per_token(self) -> float:
        """Operations of the weights for one token."""
        return 2.0 * self.weights * (1 + self.passes_gradient) + 2.0 * self.trained

    def per_pair(self) -> float:
        """Operations of attention for one pair of a token with itself or another one."""
        return 4.0 * self.attention * (3 if self.passes_gradient else 1)


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Operations of a model.

    Attributes:
        text: Language model without its head.
        head: Its head.
        tower: Vision tower.
        tower_tokens: Features of a picture inside the tower.
        between: Everything else: projector, compressors.
    """

    text: Layers
    head: Layers
    tower: Layers
    tower_tokens: int
    between: Layers

    def flops(self, work: Work) -> float:
        """Operations of a training step."""
        inside = work.pictures * self.tower_tokens
        return (
            work.tokens * self.text.per_token()
            + work.squares / 2 * self.text.per_pair()  # causal: half of the pairs
            + work.supervised * self.head.per_token()
            + inside * self.tower.per_token()
            + inside * self.tower_tokens * self.tower.per_pair()
            + max(work.visual, 0) * self.between.per_token()
        )


def model_cost(model: nn.Module) -> ModelCost:
    """Count the layers of ``model``, whose trained parameters are chosen."""
    language: Any = model.get_submodule("language_model")
    tower: Any = model.get_submodule("vision_tower")
    head = language.get_output_embeddings() if hasattr(language, "get_output_embeddings") else None
    heads = set() if head is None else {head}
    outside = [part for name, part in model.named_children() if name not in ("language_model", "vision_tower")]
    early = any(value.requires_grad for part in (tower, *outside) for value in part.parameters())
    text_config = getattr(getattr(model, "config", None), "text_config", None)
    tower_trains = any(value.requires_grad for value in tower.parameters())
    return ModelCost(
        text=_layers(
            (part for part in language.modules() if part not in heads),
            passes_gradient=early or any(value.requires_grad for value in language.parameters()),
            attention=_attention_width(text_config),
        ),
        head=_layers(heads, passes_gradient=True, attention=0),
        tower=_layers(
            tower.modules(),
            passes_gradient=tower_trains,
            attention=_attention_width(getattr(getattr(tower, "model", None), "config", None)),
        ),
        tower_tokens=int(getattr(tower, "num_tokens", 0)) + int(getattr(tower, "num_prefix_tokens", 0)),
        between=_layers(
            (module for part in outside for module in part.modules()), passes_gradient=tower_trains, attention=0
        ),
    )


def peak_tflops(device: torch.device, given: float = 0.0) -> float:
    """Matrix throughput of ``device`` in 10^12 operations a second: ``given``, else from its name; 0 if unknown."""
    if given or device.type != "cuda":
        return given
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float:
    """Peak of the device that ``name`` contains, the longest match winning; 0 if none does."""
    found = [known for known in PEAK_TFLOPS if known.lower() in name.lower()]
    return PEAK_TFLOPS[max(found, key=len)] if found else 0.0


def _layers(modules: Iterable[nn.Module], *, passes_gradient: bool, attention: int) -> Layers:
    weights = trained = 0
    for module in modules:
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features
        elif isinstance(module, nn.Conv2d):
            size = module.weight.numel()
        else:
            continue
        weights += size
        trained += size if module.weight.requires_grad else 0
    return Layers(weights=weights, trained=trained, attention=attention, passes_gradient=passes_gradient)


def _attention_width(config: Any) -> int:
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    width = int(getattr(config, "hidden_size", 0) or 0) if isinstance(getattr(config, "hidden_size", 0), int) else 0
    heads, head_dim = getattr(config, "num_attention_heads", 0), getattr(config, "head_dim", None)
    return layers * (heads * head_dim if isinstance(head_dim, int) and isinstance(heads, int) else width)
