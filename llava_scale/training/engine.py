"""One model on one or many processes: alone, replicated (DDP) or sharded (FSDP2, HSDP).

Every engine sums gradients over ranks and never averages them: the loss is divided by the number of supervised tokens
of the whole step before the backward pass, so sums are what the step needs.

What runs on some ranks only must not exchange anything. Rows without media skip the towers, therefore frozen towers
stay whole on every rank, and trained ones belong to the outermost unit, which is gathered before anything runs.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from llava_scale.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from llava_scale.config.train import ParallelConfig
    from llava_scale.training.parallel import Ranks

logger = logging.getLogger(__name__)

_PROBED = 1024  # values of each parameter that are compared between ranks


class Engine:
    """A model that one process trains alone, and the interface of the others.

    Attributes:
        model: The model itself: names, modes, evaluation.
        forward: What the training step calls instead of ``model``.
        is_sharded: Whether a process holds parts of the parameters only.
    """

    is_sharded = False

    def __init__(self, model: nn.Module, forward: Callable[..., Any] | None = None) -> None:
        self.model = model
        self.forward: Callable[..., Any] = forward or model

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """Context of one row's forward and backward pass; gradients are exchanged in the ``last`` one of a step."""
        return nullcontext()

    def end_evaluation(self) -> None:
        """Give up what passes without gradients have left gathered."""

    def full_state(self, *, keep: bool) -> dict[str, Tensor] | None:
        """The whole model's state for ``save_pretrained``; None means the model's own. All ranks must call it.

        Args:
            keep: Whether this rank wants it; the others get an empty dict.
        """
        return None


class DdpEngine(Engine):
    """Every process holds the whole model and adds its gradients to those of the others."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        kind = nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(kind.__init__).parameters
        buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": any(norm.training for norm in norms)}
        self._replica = kind(model, gradient_as_bucket_view=True, **buffers)  # type: ignore[arg-type]
        # Torch wants a hook without annotations, or with none that is a string.
        self._replica.register_comm_hook(None, lambda state, bucket: _sum_bucket(bucket))
        super().__init__(model, self._replica)

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """No exchange but in the last row."""
        context: AbstractContextManager[Any] = nullcontext() if last else self._replica.no_sync()
        return context


class Fsdp2Engine(Engine):
    """Parameters, gradients and optimizer state are sharded; each block is gathered while it runs.

    Args:
        model: Whole, the same on every rank, on the CPU; sharded in place.
        ranks: All processes.
        device: Where this one trains.
        config: How to shard.
        half: Whether matrix work is done in bfloat16.
    """

    is_sharded = True

    def __init__(
        self, model: nn.Module, ranks: Ranks, device: torch.device, config: ParallelConfig, *, half: bool
    ) -> None:
        super().__init__(model)
        # The output's tensors are never changed in place.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        _check_equal(model, ranks)
        self._reduce_every_row = config.reduce_every_row
        whole = {
            parameter
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad and not (config.shard_frozen and name.startswith("language_model."))
        }
        gathered = torch.bfloat16 if half and config.param_dtype == "bfloat16" else None
        options: dict[str, Any] = {
            "mesh": _mesh(ranks, device, config.replicas),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
            if config.cpu_offload
            else OffloadPolicy(),
        }
        for block in blocks_of(model.get_submodule("language_model")):
            if any(parameter not in whole for parameter in block.parameters()):
                reshard = config.reshard_after_forward
                fully_shard(block, ignored_params=whole, reshard_after_forward=reshard, **options)
        self._root: FSDPModule = fully_shard(model, ignored_params=whole, reshard_after_forward=False, **options)
        for parameter in whole:
            parameter.data = parameter.data.to(device)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Gradients are reduced in the last row, or in every row where that is asked for."""
        self._root.set_requires_gradient_sync(last or self._reduce_every_row)
        self._root.set_is_last_backward(last)
        yield

    def end_evaluation(self) -> None:
        """A pass without a backward pass leaves the outermost unit gathered."""
        self._root.reshard()

    def full_state(self, *, keep: bool) -> dict[str, Tensor]:
        """Gather one parameter after the other."""
        gathered: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        named = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in self.model.state_dict().items():
            owner = named.get(name, value)
            if id(owner) not in gathered:
                full = owner.detach()
                full = full.full_tensor() if isinstance(full, DTensor) else full
                gathered[id(owner)] = full.cpu() if keep else full.new_empty(0)
            if keep:
                state[name] = gathered[id(owner)]
        return state


def make_engine(
    model: nn.Module, ranks: Ranks, device: torch.device, config: ParallelConfig, *, half: bool, compiled: bool
) -> Engine:
    """Move ``model`` to ``device`` and make it ready to be trained by ``ranks``.

    Args:
        model: With its trained parameters chosen; the same on every rank.
        ranks: All processes.
        device: Where this one trains.
        config: How the processes share the work.
        half: Whether matrix work is done in bfloat16.
        compiled: Whether the language model's blocks are compiled.

    Raises:
        ConfigError: the processes cannot be divided as ``config`` says, or the blocks cannot be found.
        TrainingError: the ranks did not build the same model.
    """
    if compiled:
        for block in blocks_of(model.get_submodule("language_model")):
            block.compile(dynamic=True)
    if ranks.size == 1:
        return Engine(model.to(device))
    if config.strategy == "ddp":
        _warn_of_unused(config)
        return DdpEngine(model.to(device))
    return Fsdp2Engine(model, ranks, device, config, half=half)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Blocks of the largest stack of equal blocks inside ``module``.

    Raises:
        ConfigError: it has none.
    """
    stacks = [
        list(child)
        for child in module.modules()
        if isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1
    ]
    if not stacks:
        raise ConfigError(f"{type(module).__name__} has no stack of equal blocks to compile or shard one by one")
    return max(stacks, key=lambda blocks: sum(value.numel() for block in blocks for value in block.parameters()))


def _mesh(ranks: Ranks, device: torch.device, replicas: int) -> DeviceMesh:
    if ranks.size % replicas:
        raise ConfigError(
            f"train.parallel.replicas={replicas} does not divide the {ranks.size} processes into equal groups"
        )
    if replicas == 1:
        return init_device_mesh(device.type, (ranks.size,), mesh_dim_names=("shard",))
    shape = (replicas, ranks.size // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def _warn_of_unused(config: ParallelConfig) -> None:
    default = type(config)()
    for name in ("replicas", "reshard_after_forward", "shard_frozen", "param_dtype", "reduce_every_row", "cpu_offload"):
        if getattr(config, name) != getattr(default, name):
            logger.warning("train.parallel.%s has no effect under strategy ddp", name)


def _check_equal(model: nn.Module, ranks: Ranks) -> None:
    """Sharding takes each rank's part from its own copy, so the copies must be the same."""
    probes = [float(value.detach().flatten()[:_PROBED].double().sum()) for value in model.parameters()]
    if any(other != probes for other in ranks.gather(probes)):
        raise TrainingError(
            "the processes built different weights from the same config and seed; use the same library versions and "
            "the same kind of machine for all, or start from saved weights with model.init_from"
        )


def _sum_bucket(bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: a sum, where DDP itself would take the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    future: torch.futures.Future[list[Tensor]] = work.get_future()
    return future.then(lambda done: done.value()[0])
