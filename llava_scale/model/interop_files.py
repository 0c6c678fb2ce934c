"""Weights in files: whatever layout a checkpoint has, as one dictionary; and back as safetensors.

Pickled files are read with ``weights_only=True``: tensors and plain containers, never code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_scale.errors import CheckpointError

State = dict[str, Tensor]

SHARD_BYTES = 5_000_000_000
"""Larger checkpoints are cut into several files."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is no such file.

    Raises:
        CheckpointError: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_state(folder: Path) -> State:
    """All tensors of a checkpoint folder: safetensors if there are any, else pickled files.

    Raises:
        CheckpointError: no weights there, or a file is missing or damaged.
    """
    files = _weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder} holds no weights (model.safetensors, pytorch_model.bin or parts of them)")
    state: State = {}
    for path in files:
        state |= read_tensors(path)
    return state


def read_tensors(path: Path) -> State:
    """Tensors of one file, mapped from the disk where that is possible.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # torch raises pickle.UnpicklingError for anything but tensors
        raise CheckpointError(f"{path} holds more than tensors and is not loaded: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} must hold named tensors only")
    return found


def write_state(folder: Path, state: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``state`` as ``model.safetensors``, or as parts of ``shard_bytes`` with an index."""
    parts: list[State] = [{}]
    filled = 0
    for name, tensor in state.items():
        if parts[-1] and filled + tensor.nbytes > shard_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += tensor.nbytes
    if len(parts) == 1:
        write_tensors(folder / "model.safetensors", parts[0])
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_tensors(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in state.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; tensors that share memory are written each by itself."""
    seen: set[int] = set()
    whole: State = {}
    for name, tensor in state.items():
        kept = tensor.detach().contiguous().cpu()
        address = kept.untyped_storage().data_ptr()
        whole[name] = kept.clone() if address in seen else kept
        seen.add(address)
    save_file(whole, path, metadata={"format": "pt"})


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill; it takes the name ``target`` when the block ends without an error.

    Raises:
        CheckpointError: ``target`` exists and is not empty, or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; choose another folder")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _weight_files(folder: Path) -> list[Path]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = read_json(folder / f"{stem}.index.json").get("weight_map")
        if isinstance(index, dict):
            return [folder / _inside(name, folder) for name in sorted(set(index.values()))]
        if (folder / stem).is_file():
            return [folder / stem]
    return []


def _inside(name: object, folder: Path) -> str:
    """A file name from an index, which must not lead out of the folder."""
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{folder}: its index names {name!r}, which is no file of this folder")
    return name
