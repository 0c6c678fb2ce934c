"""Drawing the next token, one random generator a request: an answer does not depend on its batch."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_scale.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the scores; 0 always takes the likeliest token.
        top_p: Tokens are drawn from the smallest set that holds this share of the probability.
        seed: Makes draws repeatable; a new one each time if None.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.temperature == 0 and self.top_p < 1:
            raise ConfigError("top_p has no effect at temperature 0; raise the temperature or leave top_p out")

    def choosers(self, numbers: Sequence[int]) -> list[Chooser]:
        """One chooser for each request, by its number."""
        if not self.temperature:
            return [Chooser(self, None) for _ in numbers]
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return [Chooser(self, torch.Generator().manual_seed(_mixed(seed, number))) for number in numbers]


@dataclass(frozen=True, slots=True)
class Chooser:
    """How one answer's tokens are chosen, with its own source of chance; None where nothing is drawn."""

    sampling: Sampling
    generator: torch.Generator | None


def choose_tokens(scores: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """The next token of each row of ``scores``, ``(B, V)``."""
    chosen: list[int] = scores.argmax(dim=-1).tolist()
    drawn = [row for row, chooser in enumerate(choosers) if chooser.generator is not None]
    if drawn:
        some = _perturbed(scores[drawn].float(), [choosers[row] for row in drawn]).argmax(dim=-1).tolist()
        for row, token in zip(drawn, some, strict=True):
            chosen[row] = token
    return chosen


def _perturbed(scores: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Scores with each row's noise added, so that the maximum is a draw (Gumbel-max)."""
    temperature, top_p = (
        torch.tensor([[getattr(chooser.sampling, name)] for chooser in choosers], device=scores.device)
        for name in ("temperature", "top_p")
    )
    kept = keep_top_p(scores / temperature, top_p)
    draws = [torch.rand(scores.shape[1], generator=chooser.generator) for chooser in choosers]
    uniform = torch.stack(draws).clamp_(min=torch.finfo(torch.float32).tiny)
    return kept - uniform.log_().neg_().clamp_(min=1e-30).log_().to(kept.device)


def keep_top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    """Set every score to -inf but those of the smallest set that holds each row's share ``(B, 1)`` of probability."""
    if bool((top_p >= 1).all()):
        return scores
    ordered, order = scores.sort(dim=-1, descending=True)
    shares = ordered.softmax(dim=-1)
    surplus = (shares.cumsum(dim=-1) - shares >= top_p) & (top_p < 1)
    return scores.masked_fill(surplus.scatter(-1, order, surplus), float("-inf"))


def _mixed(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
