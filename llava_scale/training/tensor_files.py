"""The tensors of a checkpoint: whole in two files, or sharded through torch's distributed checkpointing.

Both are safetensors: no file of a checkpoint can run code when it is read. A shard file names in its header which
part of each tensor it holds, so that any number of processes, sharded or not, can read any checkpoint.
Optimizer state is named ``<parameter>/<entry>``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from llava_scale.errors import CheckpointError

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from torch import Tensor, nn

TRAINABLE, OPTIMIZER = "trainable.safetensors", "optimizer.safetensors"
"""Files of a checkpoint with whole tensors."""


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers by name: what two runs of one config can differ in."""
    buffers = {name for name, _ in model.named_buffers()}
    own = {name: value for name, value in model.state_dict().items() if name in buffers}
    own.update({name: value for name, value in model.named_parameters() if value.requires_grad})
    return {name: value.detach() for name, value in own.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by name."""
    return {
        f"{name}/{entry}": value.detach()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def write_whole(folder: Path, own: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    """Write whole tensors into ``folder``."""
    save_file({name: value.contiguous() for name, value in own.items()}, folder / TRAINABLE)
    save_file({name: value.contiguous() for name, value in moments.items()}, folder / OPTIMIZER)


def write_shards(folder: Path, tensors: dict[str, Tensor], group: Any) -> None:
    """Write this rank's parts into ``folder``; every rank of ``group`` must call it."""
    save(_without_scalars(tensors), storage_writer=_writer(folder), process_group=group)


def write_shards_later(folder: Path, tensors: dict[str, Tensor], group: Any) -> Future[Any]:
    """As ``write_shards``, but return as soon as this rank's parts are copied to host memory."""
    later: Any = async_save(_without_scalars(tensors), storage_writer=_writer(folder), process_group=group)
    return cast("Future[Any]", later)


def files_of_rank(folder: Path, rank: int) -> list[Path]:
    """Shard files that ``rank`` has written."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def restore(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool = False) -> None:
    """Load trained parameters, buffers and optimizer state from a whole checkpoint, written by any number of ranks.

    Args:
        path: The checkpoint.
        model: Takes the parameters and buffers.
        optimizer: Takes its state.
        sharded: Whether the model is sharded over processes; then each must call this.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    if (path / TRAINABLE).exists() and not sharded:
        _load_own_tensors(model, load_file(path / TRAINABLE), path)
        _load_optimizer(optimizer, load_file(path / OPTIMIZER), path)
    else:
        _restore_any(path, model, optimizer)


def restore_model(path: Path, model: nn.Module) -> None:
    """Load trained parameters and buffers alone, into a model that one process holds whole.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    if (path / TRAINABLE).exists():
        _load_own_tensors(model, load_file(path / TRAINABLE), path)
    else:
        _restore_any(path, model, None)


@torch.no_grad()
def _load_own_tensors(model: nn.Module, stored: dict[str, Tensor], path: Path) -> None:
    own = own_tensors(model)
    _expect_same_names(set(stored), set(own), f"{path / TRAINABLE}")
    targets = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for name, value in stored.items():
        _expect_same_shape(name, value, own[name], f"{path / TRAINABLE}")
        targets[name].copy_(value)


def _load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Tensor], path: Path) -> None:
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in stored.items():
        name, _, entry = key.rpartition("/")
        entries.setdefault(name, {})[entry] = value
    names = [name for group in optimizer.param_groups for name in group["names"]]
    _expect_known(set(entries), set(names), f"{path / OPTIMIZER}")
    plain = optimizer.state_dict()
    plain["state"] = {number: entries[name] for number, name in enumerate(names) if name in entries}
    optimizer.load_state_dict(plain)


def _restore_any(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Read each tensor, or this rank's part of it, from whichever files hold it."""
    reader = _Reader(str(path))
    stored: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    own = own_tensors(model)
    _expect_same_names({name for name in stored if "/" not in name}, set(own), str(path))
    targets = {**own, **({} if optimizer is None else _empty_moments(optimizer, set(stored), str(path)))}
    for name, value in targets.items():
        if stored[name].size.numel() != value.numel() or (value.ndim and stored[name].size != value.shape):
            _refuse_shape(name, stored[name].properties.dtype, stored[name].size, value, str(path))
    # The sharded writer stores scalars as vectors of one value.
    views = {
        name: value if len(stored[name].size) == value.ndim else value.reshape(1) for name, value in targets.items()
    }
    load(views, storage_reader=reader, no_dist=not dist.is_initialized())


def _empty_moments(optimizer: torch.optim.Optimizer, stored: set[str], place: str) -> dict[str, Tensor]:
    """Memory for the optimizer's state, put into the optimizer, by the names under which it is stored."""
    parameters = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    entries = [key.rpartition("/") for key in stored if "/" in key]
    _expect_known({name for name, _, _ in entries}, set(parameters), place)
    optimizer.state.clear()
    for name, _, entry in entries:
        optimizer.state[parameters[name]][entry] = _empty_entry(parameters[name], entry)
    return {f"{name}/{entry}": optimizer.state[parameters[name]][entry] for name, _, entry in entries}


def _empty_entry(parameter: Tensor, entry: str) -> Tensor:
    """Memory for one entry of the optimizer's state, laid out as AdamW lays it out."""
    if entry == "step":
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        return torch.zeros((), dtype=torch.float32, device=local.device)
    return torch.zeros_like(parameter, requires_grad=False)


class _Reader(HuggingFaceStorageReader):
    """Torch's reader cannot slice a scalar."""

    def _process_read_request(self, f: Any, req: Any, planner: Any) -> None:
        if len(req.lengths):
            super()._process_read_request(f, req, planner)
            return
        target = planner.resolve_tensor(req).detach()
        target.copy_(f.get_tensor(req.storage_index.fqn))
        planner.commit_tensor(req, target)


def _writer(folder: Path) -> HuggingFaceStorageWriter:
    return HuggingFaceStorageWriter(str(folder), save_distributed=True)


def _without_scalars(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value if value.ndim else value.reshape(1) for name, value in tensors.items()}


def _expect_same_names(stored: set[str], own: set[str], place: str) -> None:
    missing, unexpected = sorted(own - stored), sorted(stored - own)
    if missing or unexpected:
        raise CheckpointError(
            f"{place}: {len(missing)} names missing {missing[:5]}, {len(unexpected)} unexpected {unexpected[:5]}; "
            "resume with the config that wrote the checkpoint"
        )


def _expect_known(stored: set[str], known: set[str], place: str) -> None:
    unknown = sorted(stored - known)
    if unknown:
        raise CheckpointError(f"{place}: unknown parameters {unknown[:5]}; the trained modules changed")


def _expect_same_shape(name: str, stored: Tensor, own: Tensor, place: str) -> None:
    if stored.shape != own.shape or stored.dtype != own.dtype:
        _refuse_shape(name, stored.dtype, stored.shape, own, place)


def _refuse_shape(name: str, dtype: torch.dtype, shape: torch.Size, own: Tensor, place: str) -> None:
    raise CheckpointError(
        f"{place}: {name} is {dtype} {tuple(shape)}, the model's is {own.dtype} {tuple(own.shape)}; resume with the "
        "config that wrote the checkpoint"
    )
