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

    def generators(self, numbers: Sequence[int]) -> list[torch.Generator]:
        """One generator for each request, by its number."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return [torch.Generator().manual_seed(_mixed(seed, number)) for number in numbers]


class TokenSampler:
    """Turns scores so that their maximum is a draw from the distribution (Gumbel-max), row by row.

    A logits processor for ``generate`` without its own sampling, whose draws depend on the neighbours in the batch.
    """

    def __init__(self, sampling: Sampling, generators: Sequence[torch.Generator]) -> None:
        self._sampling = sampling
        self._generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``(B, V)`` after temperature and top-p, with each row's noise added."""
        scaled = keep_top_p(scores.float() / self._sampling.temperature, self._sampling.top_p)
        draws = [torch.rand(scores.shape[1], generator=generator) for generator in self._generators]
        uniform = torch.stack(draws).clamp_(min=torch.finfo(torch.float32).tiny)
        return scaled - uniform.log_().neg_().clamp_(min=1e-30).log_().to(scaled.device)


def keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Set every score to -inf but those of the smallest set that holds the share ``top_p`` of the probability."""
    if top_p >= 1:
        return scores
    ordered, order = scores.sort(dim=-1, descending=True)
    shares = ordered.softmax(dim=-1)
    surplus = shares.cumsum(dim=-1) - shares >= top_p
    return scores.masked_fill(surplus.scatter(-1, order, surplus), float("-inf"))


def _mixed(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
