"""Schedules of the merge ratio and random choices: pure functions of the optimizer step, never counters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RAMPS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 1.0 - math.cos(math.pi / 2 * done),
    "linear": lambda done: done,
    "constant": lambda done: 1.0,
}
"""Share of the final ratio that is in force when the share ``done`` of the warm-up is over, by name."""

RAMP_MULTIPLE = 16
"""Token counts on a ramp are multiples of this: 129 different lengths would be 129 compilations."""

_CLOSE = 1e-9
"""0.29 * 100 is 28.999...96; such a product means 29."""


def merge_ratio(step: int | None, *, final: float, warmup_steps: int, ramp: str = "cosine") -> float:
    """Share of the tokens to remove at optimizer step ``step``; ``final`` at evaluation (None)."""
    if step is None or step >= warmup_steps:
        return final
    return final * RAMPS[ramp](step / warmup_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioSchedule:
    """How many tokens are removed at each step.

    Attributes:
        final: Share removed once the ramp is over, in [0, 1).
        warmup_steps: Optimizer steps of the ramp from 0 to ``final``.
        ramp: Its form, a name in ``RAMPS``.
    """

    final: float
    warmup_steps: int = 0
    ramp: str = "cosine"

    def ratio(self, step: int | None) -> float:
        """Share to remove at ``step``; ``final`` at evaluation (None)."""
        return merge_ratio(step, final=self.final, warmup_steps=self.warmup_steps, ramp=self.ramp)

    def num_kept(self, num_tokens: int, step: int | None, *, least: int = 1) -> int:
        """Tokens left of ``num_tokens``, at least ``least``.

        ``floor(ratio * num_tokens)`` are removed; on a ramp what is left is rounded up to a multiple of
        ``RAMP_MULTIPLE``.
        """
        kept = _kept(num_tokens, self.ratio(step), least)
        if step is None or step >= self.warmup_steps:
            return kept
        return min(math.ceil(kept / RAMP_MULTIPLE) * RAMP_MULTIPLE, num_tokens)


def _kept(num_tokens: int, ratio: float, least: int) -> int:
    return max(num_tokens - math.floor(ratio * num_tokens + _CLOSE), min(least, num_tokens))


_PRIMES = (2_147_483_647, 2_147_483_399, 2_147_483_563)
_FACTORS = (48_271, 40_692, 40_014)


def random_integers(step: int | None, count: int, *, device: torch.device) -> Tensor:
    """``(count,)`` int64 in [0, 2**23): a fixed function of ``step`` and the place, the same on every device.

    Three multiplicative congruential generators one after the other, with bits folded between them: no generator
    object to carry around, seed or save, and nothing that would break a compiled graph. Good for choices, not for
    cryptography.
    """
    drawn: Tensor = _random_integers(0 if step is None else step + 1, count, device)
    return drawn


# One operator for the compiler, which cannot simplify these remainders for a step that it does not know.
@torch.library.custom_op("llava_scale::random_integers", mutates_args=())
def _random_integers(start: int, count: int, device: torch.device) -> Tensor:
    place = torch.arange(1, count + 1, device=device)
    bits = (place * 104_729 + start % _PRIMES[0] * 7_919_993) % _PRIMES[0]
    for prime, factor in zip(_PRIMES, _FACTORS, strict=True):
        bits = (bits ^ (bits >> 15)) * factor % prime
    return bits >> 8


@_random_integers.register_fake
def _(start: int, count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=device)
