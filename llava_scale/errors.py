"""The errors that users of llava_scale see.

Every message says what is wrong, where (config field, shard, sample key) and what to do.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class LlavaScaleError(Exception):
    """Base of every error that llava_scale raises on purpose."""


class ConfigError(LlavaScaleError):
    """A config field is unknown, missing, out of range, or contradicts another one."""


class ShardError(LlavaScaleError):
    """A shard, its index, or the data set's description is missing, torn or inconsistent."""


class SampleError(LlavaScaleError):
    """One sample cannot be used; it counts against the error budget.

    Args:
        reason: What is wrong and what to do, without the location.
        shard: Name of the shard (or source file) that holds the sample.
        key: Key of the sample inside the shard.
    """

    def __init__(self, reason: str, *, shard: str = "", key: str = "") -> None:
        self.reason = reason
        self.shard = shard
        self.key = key
        super().__init__(reason)

    def __str__(self) -> str:
        where = f"{self.shard}: " if self.shard else ""
        name = f"sample {self.key!r}: " if self.key else ""
        return f"{where}{name}{self.reason}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_sample_error, (self.reason, self.shard, self.key)

    def at(self, *, shard: str, key: str) -> SampleError:
        """Return the same error with the location filled in where it was missing."""
        return SampleError(self.reason, shard=self.shard or shard, key=self.key or key)


class ShapeError(LlavaScaleError):
    """Tensors or token counts do not fit together."""


class CheckpointError(LlavaScaleError):
    """A checkpoint is missing, torn, or does not belong to this model or run."""


class TrainingError(LlavaScaleError):
    """Training cannot go on, for example because the loss stays non-finite."""


class MissingExtraError(LlavaScaleError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'llava-scale[{extra}]'")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to ``name``, else the list."""
    choices = sorted(known)
    close = get_close_matches(name, choices, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(choices)


def _rebuild_sample_error(reason: str, shard: str, key: str) -> SampleError:
    return SampleError(reason, shard=shard, key=key)
