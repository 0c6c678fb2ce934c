"""Processes that train together, as torchrun (or any launcher that sets the same variables) starts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llava_scale.errors import ConfigError
from llava_scale.training.parallel import PeerError, Ranks

T = TypeVar("T")

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class ProcessRanks(Ranks):
    """One of several processes.

    Counts and objects travel through gloo between hosts, so asking for them never waits for an accelerator; tensors
    travel where they lie.

    Attributes:
        group: For counts and objects of the training thread.
        spare: For those of the thread that writes checkpoints.
    """

    group: Any = None
    spare: Any = None

    def total(self, count: int) -> int:
        """Sum of ``count`` over all ranks."""
        return int(self._sum([count], torch.int64)[0])

    def totals(self, counts: Sequence[float]) -> list[float]:
        """Sums over all ranks of several counts."""
        return self._sum(counts, torch.float64)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank."""
        return self.total(int(flag)) > 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over all ranks, on its device; return it."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on the first rank, where alone it runs."""
        outcome: list[Any] = [None, None]
        failed: BaseException | None = None
        if self.is_first:
            try:
                outcome[0] = make()
            except Exception as error:  # told to the others, then raised
                failed, outcome[1] = error, f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if failed is not None:
            raise failed
        if outcome[1] is not None:
            raise PeerError(f"rank 0 stopped: {outcome[1]}")
        value: T = outcome[0]
        return value

    def background(self) -> Ranks:
        """The same ranks for another thread."""
        return ProcessRanks(self.rank, self.size, self.local_rank, group=self.spare, spare=self.spare)

    def _sum(self, counts: Sequence[float], dtype: torch.dtype) -> list[Any]:
        values = torch.tensor(counts, dtype=dtype)
        dist.all_reduce(values, group=self.group)
        return values.tolist()


@contextmanager
def open_ranks(environment: Mapping[str, str], *, device: str, timeout_s: float) -> Iterator[Ranks]:
    """Join the other processes that ``environment`` tells of; alone without ``RANK`` or in a world of one.

    Args:
        environment: Variables of the launcher: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
        device: ``auto``, ``cpu`` or ``cuda``: where the tensors will lie.
        timeout_s: How long a process waits for the others.

    Raises:
        ConfigError: some of the variables are missing.
    """
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    missing = [name for name in _NEEDED if name not in environment]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} are not set; start the run with "
            "torchrun --nproc-per-node N --no-python llava-scale train ..."
        )
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank = int(environment.get("LOCAL_RANK", rank))
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_cuda:
        torch.cuda.set_device(local_rank)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", rank=rank, world_size=size, timeout=timeout)
    groups = [dist.new_group(backend="gloo", timeout=timeout) for _ in range(2)]
    yield ProcessRanks(rank, size, local_rank, group=groups[0], spare=groups[1])
    # Not after an error: the others may hang in an exchange, and taking leave would wait for them.
    dist.destroy_process_group()
