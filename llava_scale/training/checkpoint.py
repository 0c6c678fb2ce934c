"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder ``step-00000100``::

    trainable.safetensors   trained parameters, and every buffer that belongs to the model's state
    optimizer.safetensors   optimizer state, as ``<parameter>/<entry>``
    state.json              step, position of the loader, counters, random states, versions
    config.yaml             the resolved config
    manifest.json           size and SHA-256 of each file above

Frozen parameters are not stored: the config builds them again, and a fingerprint proves that they are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from llava_scale import __version__
from llava_scale.errors import CheckpointError
from llava_scale.training.files import atomic_folder, remove_folder

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

logger = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST, _STATE, _CONFIG = "manifest.json", "state.json", "config.yaml"
_TRAINABLE, _OPTIMIZER = "trainable.safetensors", "optimizer.safetensors"
_HASH_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What the loop remembers between two steps, as plain JSON values.

    Attributes:
        step: Finished optimizer steps.
        total_steps: Steps of the whole run; fixed at its start, because the schedule depends on it.
        loader: State of the data stream after the last finished step.
        counters: State of the counters behind the log.
        random: States of the global random generators.
        frozen: Fingerprint of the frozen parameters.
        config: The resolved config.
    """

    step: int
    total_steps: int
    loader: dict[str, Any]
    counters: dict[str, Any]
    random: dict[str, Any]
    frozen: str
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Search:
    """Result of looking for a checkpoint to continue from.

    Attributes:
        found: The newest whole checkpoint, or None.
        rejected: Newer ones that are torn or corrupt, newest first, and why.
    """

    found: Path | None
    rejected: tuple[tuple[Path, str], ...]


def save_checkpoint(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainerState, keep: int
) -> Path:
    """Write checkpoint ``state.step`` into ``folder``, then remove all but the ``keep`` newest; return its path.

    Raises:
        CheckpointError: it cannot be written; older checkpoints are left as they are.
    """
    target = folder / f"step-{state.step:08d}"
    with atomic_folder(target) as partial:
        save_file(_own_tensors(model), partial / _TRAINABLE)
        save_file(_optimizer_tensors(optimizer), partial / _OPTIMIZER)
        (partial / _CONFIG).write_text(yaml.safe_dump(state.config, sort_keys=False, allow_unicode=True), "utf-8")
        rest = {key: value for key, value in asdict(state).items() if key != "config"}
        (partial / _STATE).write_text(json.dumps({"versions": _versions(), **rest}), "utf-8")
        files = {name: _describe(partial / name) for name in (_TRAINABLE, _OPTIMIZER, _CONFIG, _STATE)}
        manifest = {"format": FORMAT, "step": state.step, "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    for old in list_checkpoints(folder)[keep:]:
        try:
            remove_folder(old)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", old, error)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, newest first, whole or not."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def find_checkpoint(folder: Path) -> Search:
    """Return the newest whole checkpoint in ``folder``; newer ones that fail their checksums are reported.

    Raises:
        CheckpointError: there are checkpoints, but none of them is whole.
    """
    rejected: list[tuple[Path, str]] = []
    for path in list_checkpoints(folder):
        problem = verify_checkpoint(path)
        if problem is None:
            return Search(found=path, rejected=tuple(rejected))
        rejected.append((path, problem))
    if rejected:
        reasons = "\n  ".join(f"{path.name}: {problem}" for path, problem in rejected)
        raise CheckpointError(
            f"no checkpoint in {folder} can be used:\n  {reasons}\n"
            "remove them to start from step 0 with --resume, or choose another train.output_dir"
        )
    return Search(found=None, rejected=())


def verify_checkpoint(path: Path) -> str | None:
    """Return what is wrong with the checkpoint at ``path`` (sizes and checksums of all files), or None."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text("utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for name in (_TRAINABLE, _OPTIMIZER, _CONFIG, _STATE):
            size, digest = manifest["files"][name]["size"], manifest["files"][name]["sha256"]
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if _describe(path / name)["sha256"] != digest:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"{error.filename or path}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} is damaged ({type(error).__name__}: {error})"
    return None


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is neither found nor counted again; return its new path."""
    target = path.with_name(f"{path.name}.damaged")
    remove_folder(target)
    return path.rename(target)


def load_state(path: Path) -> TrainerState:
    """Read the loop's state from a whole checkpoint."""
    values = json.loads((path / _STATE).read_text("utf-8"))
    values["config"] = yaml.safe_load((path / _CONFIG).read_text("utf-8"))
    return TrainerState(**{item.name: values[item.name] for item in fields(TrainerState)})


def restore(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load trained parameters, buffers and optimizer state from a whole checkpoint.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    _load_own_tensors(model, load_file(path / _TRAINABLE), path)
    _load_optimizer(optimizer, load_file(path / _OPTIMIZER), path)


def frozen_fingerprint(model: nn.Module) -> str:
    """Return a hash over names, shapes, types and every bit of the frozen parameters.

    The sums run on the parameters' device in exact integer arithmetic, so every device gives the same hash.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            shape = tuple(parameter.shape)
            digest.update(f"{name} {shape} {parameter.dtype} {_checksum(parameter.detach())}\n".encode())
    return digest.hexdigest()


def _checksum(tensor: Tensor) -> int:
    """Sum of the bit patterns, each times an odd number that depends on its position, modulo 2**64."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.contiguous().view(-1).view(words)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), _HASH_BLOCK):
        block = flat[start : start + _HASH_BLOCK].long()
        place = torch.arange(start, start + block.numel(), device=tensor.device)
        total += (block * (place * 0x9E3779B97F4A7C1 | 1)).sum()
    return int(total)


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers by name: what two runs of one config can differ in."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own = {name: value for name, value in model.state_dict().items() if name not in parameters}
    own.update({name: value for name, value in model.named_parameters() if value.requires_grad})
    return {name: value.detach().contiguous() for name, value in own.items()}


@torch.no_grad()
def _load_own_tensors(model: nn.Module, stored: dict[str, Tensor], path: Path) -> None:
    own = _own_tensors(model)
    _expect_same_names(stored, own, f"{path / _TRAINABLE}")
    targets = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for name, value in stored.items():
        if value.shape != own[name].shape or value.dtype != own[name].dtype:
            raise CheckpointError(
                f"{path / _TRAINABLE}: {name} is {value.dtype} {tuple(value.shape)}, the model's is "
                f"{own[name].dtype} {tuple(own[name].shape)}; resume with the config that wrote the checkpoint"
            )
        targets[name].copy_(value)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{entry}": value.detach().contiguous()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Tensor], path: Path) -> None:
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in stored.items():
        name, _, entry = key.rpartition("/")
        entries.setdefault(name, {})[entry] = value
    names = [name for group in optimizer.param_groups for name in group["names"]]
    unknown = sorted(set(entries) - set(names))
    if unknown:
        raise CheckpointError(f"{path / _OPTIMIZER}: unknown parameters {unknown[:5]}; the trained modules changed")
    plain = optimizer.state_dict()
    plain["state"] = {number: entries[name] for number, name in enumerate(names) if name in entries}
    optimizer.load_state_dict(plain)


def _expect_same_names(stored: dict[str, Tensor], own: dict[str, Tensor], place: str) -> None:
    missing, unexpected = sorted(set(own) - set(stored)), sorted(set(stored) - set(own))
    if missing or unexpected:
        raise CheckpointError(
            f"{place}: {len(missing)} names missing {missing[:5]}, {len(unexpected)} unexpected {unexpected[:5]}; "
            "resume with the config that wrote the checkpoint"
        )


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _versions() -> dict[str, str]:
    return {
        "llava_scale": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("transformers", "safetensors", "numpy")},
    }
