"""Who this process is among the processes of a run. Ranks are handed down, never looked up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """One process that trains alone, and the interface of many that train together.

    The loop asks for sums over ranks only through this object, and in the same order on every rank.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes that share each global batch.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def total(self, count: int) -> int:
        """Sum of ``count`` over all ranks."""
        return count

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank."""
        return flag
