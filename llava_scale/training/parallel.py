"""Who this process is among the processes of a run. Ranks are handed down, never looked up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from llava_scale.errors import LlavaScaleError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class PeerError(LlavaScaleError):
    """The first process met an error and tells; the others raise this and need not repeat it to people."""


@dataclass(frozen=True)
class Ranks:
    """One process that trains alone, and the interface of many that train together.

    The loop asks for sums over ranks only through this object, and in the same order on every rank.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes that share each global batch.
        local_rank: Number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def total(self, count: int) -> int:
        """Sum of ``count`` over all ranks."""
        return count

    def totals(self, counts: Sequence[float]) -> list[float]:
        """Sums over all ranks of several counts."""
        return list(counts)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank."""
        return flag

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over all ranks, on its device; return it."""
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on the first rank, where alone it runs.

        Raises:
            PeerError: it raised there; the first rank raises the error itself.
        """
        return make()

    def background(self) -> Ranks:
        """The same ranks for another thread, whose exchanges do not mix with those of this one."""
        return self
