"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder ``step-00000100``::

    trainable.safetensors   trained parameters, and every buffer that belongs to the model's state
    optimizer.safetensors   optimizer state, as ``<parameter>/<entry>``
    state.json              step, position of the loader, counters, random states, versions
    config.yaml             the resolved config
    manifest.json           size and SHA-256 of each file above

A sharded run writes one ``shard-*.safetensors`` per rank instead of the first two files. Frozen parameters are not
stored: the config builds them again, and a fingerprint proves that they are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import yaml

from llava_scale import __version__
from llava_scale.errors import CheckpointError
from llava_scale.training.files import begin_folder, cannot_write, discard_folder, finish_folder, remove_folder
from llava_scale.training.parallel import Ranks
from llava_scale.training.tensor_files import (
    files_of_rank,
    optimizer_tensors,
    own_tensors,
    write_shards,
    write_shards_later,
    write_whole,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

logger = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST, _STATE, _CONFIG = "manifest.json", "state.json", "config.yaml"
_HASH_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What the loop remembers between two steps, as plain JSON values.

    Attributes:
        step: Finished optimizer steps.
        total_steps: Steps of the whole run; fixed at its start, because the schedule depends on it.
        loader: State of the data stream after the last finished step.
        counters: State of the counters behind the log.
        random: States of the global random generators, one entry a rank.
        frozen: Fingerprint of the frozen parameters.
        config: The resolved config.
    """

    step: int
    total_steps: int
    loader: dict[str, Any]
    counters: dict[str, Any]
    random: list[dict[str, Any]]
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


class CheckpointWriter:
    """Writes the checkpoints of a run, all ranks together, one at a time.

    Args:
        folder: Where they go.
        keep: Newest ones kept.
        ranks: All processes of the run; each calls every method.
        sharded: Whether every rank writes its own part; else the first writes everything.
        in_background: Return from ``save`` as soon as the tensors are copied to host memory.
        on_saved: Told of every whole checkpoint, on the first rank.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        ranks: Ranks | None = None,
        sharded: bool = False,
        in_background: bool = False,
        on_saved: Callable[[Path], None] | None = None,
    ) -> None:
        self._folder, self._keep, self._sharded, self._in_background = folder, keep, sharded, in_background
        self._ranks = ranks or Ranks()
        self._behind = self._ranks.background()
        self._on_saved = on_saved or (lambda path: None)
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None
        self._saved: Path | None = None

    def save(self, state: TrainerState, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
        """Write checkpoint ``state.step``, then remove all but the newest; return its path.

        Raises:
            CheckpointError: it, or the one before in the background, cannot be written; older checkpoints are left as
                they are.
        """
        self.wait()
        target = self._folder / f"step-{state.step:08d}"
        partial = self._ranks.from_first(lambda: begin_folder(target))
        write = self._prepare(partial, own_tensors(model), optimizer_tensors(optimizer))
        texts = _texts(state) if self._ranks.is_first else {}
        if self._in_background:
            arguments = (write, texts, partial, target, state.step)
            self._thread = threading.Thread(target=self._guarded, args=arguments, name="checkpoint")
            self._thread.start()
        else:
            self._guarded(write, texts, partial, target, state.step)
            self.wait()
        return target

    def wait(self) -> None:
        """Wait for the checkpoint that is being written in the background.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem
        saved, self._saved = self._saved, None
        if saved is not None and self._ranks.is_first:
            self._on_saved(saved)

    def _prepare(self, partial: Path, own: dict[str, Tensor], moments: dict[str, Tensor]) -> Callable[[], object]:
        """What writes the tensors; in the background they are copied before this returns."""
        group = getattr(self._behind, "group", None)
        if self._sharded:
            tensors = {**own, **moments}
            if self._in_background:
                return write_shards_later(partial, tensors, group).result
            return lambda: write_shards(partial, tensors, group)
        if not self._ranks.is_first:
            return lambda: None
        if self._in_background:
            own, moments = _copied(own), _copied(moments)
        return lambda: write_whole(partial, own, moments)

    def _guarded(
        self, write: Callable[[], object], texts: dict[str, str], partial: Path, target: Path, step: int
    ) -> None:
        """Write, agree with the other ranks that all went well, and give the checkpoint its name."""
        try:
            self._write(write, texts, partial, target, step)
            self._saved = target
        except Exception as error:  # whatever it is, it must not be lost with the thread
            self._problem = error if isinstance(error, CheckpointError) else cannot_write(target, error)
            self._problem.__cause__ = error.__cause__ or error

    def _write(
        self, write: Callable[[], object], texts: dict[str, str], partial: Path, target: Path, step: int
    ) -> None:
        outcome: dict[str, Any] = {}
        failed: Exception | None = None
        try:
            write()
            for name, text in texts.items():
                (partial / name).write_text(text, "utf-8")
            mine = files_of_rank(partial, self._ranks.rank)
            if self._ranks.is_first:
                mine += [path for path in partial.iterdir() if not path.name.startswith("shard-")]
            outcome["files"] = {path.name: _describe(path) for path in mine}
        except Exception as error:  # the others must hear of it
            failed, outcome["problem"] = error, f"{type(error).__name__}: {error}"
        parts = self._behind.gather(outcome)
        problems = [f"rank {rank}: {part['problem']}" for rank, part in enumerate(parts) if "problem" in part]
        if problems:
            if self._ranks.is_first:
                discard_folder(partial)
            if failed is not None:
                raise failed
            raise cannot_write(target, problems[0])
        files = {name: entry for part in parts for name, entry in part["files"].items()}
        self._behind.from_first(lambda: self._finish(partial, target, files, step))

    def _finish(self, partial: Path, target: Path, files: dict[str, Any], step: int) -> None:
        manifest = {"format": FORMAT, "step": step, "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        finish_folder(partial, target)
        for old in list_checkpoints(self._folder)[self._keep :]:
            try:
                remove_folder(old)
            except OSError as error:
                logger.warning("cannot remove the old checkpoint %s: %s", old, error)


def save_checkpoint(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainerState, keep: int
) -> Path:
    """Write checkpoint ``state.step`` of a single process into ``folder``, then remove all but the ``keep`` newest.

    Raises:
        CheckpointError: it cannot be written; older checkpoints are left as they are.
    """
    return CheckpointWriter(folder, keep=keep).save(state, model=model, optimizer=optimizer)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, newest first, whole or not."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def find_checkpoint(folder: Path, ranks: Ranks | None = None) -> Search:
    """Return the newest whole checkpoint in ``folder``; newer ones that fail their checksums are reported.

    Several ranks share the work of reading; each must call this.

    Raises:
        CheckpointError: there are checkpoints, but none of them is whole.
    """
    ranks = ranks or Ranks()
    rejected: list[tuple[Path, str]] = []
    for path in ranks.from_first(lambda: list_checkpoints(folder)):
        problem = verify_checkpoint(path, ranks)
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


def verify_checkpoint(path: Path, ranks: Ranks | None = None) -> str | None:
    """Return what is wrong with the checkpoint at ``path`` (sizes and checksums of all files), or None."""
    ranks = ranks or Ranks()
    problems = ranks.gather(_verify_share(path, ranks))
    return next((problem for problem in problems if problem is not None), None)


def _verify_share(path: Path, ranks: Ranks) -> str | None:
    try:
        manifest = json.loads((path / _MANIFEST).read_text("utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if not {_STATE, _CONFIG} < set(entries):
            return f"{_MANIFEST} names no tensors"
        for name, (size, digest) in sorted(entries.items())[ranks.rank :: ranks.size]:
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if _describe(path / name)["sha256"] != digest:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"{error.filename or path}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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


def frozen_fingerprint(model: nn.Module, ranks: Ranks | None = None) -> str:
    """Return a hash over names, shapes, types and every bit of the frozen parameters.

    The sums run on the parameters' device in exact integer arithmetic, so every device gives the same hash. Several
    ranks share the work; each must call this, with a model that is whole.
    """
    ranks = ranks or Ranks()
    frozen = sorted((name, value) for name, value in model.named_parameters() if not value.requires_grad)
    own = [
        f"{name} {tuple(value.shape)} {value.dtype} {parameter_checksum(value.detach())}\n"
        for name, value in frozen[ranks.rank :: ranks.size]
    ]
    digest = hashlib.sha256()
    shares = ranks.gather(own)
    for number in range(len(frozen)):
        digest.update(shares[number % ranks.size][number // ranks.size].encode())
    return digest.hexdigest()


def parameter_checksum(tensor: Tensor) -> int:
    """Sum of the bit patterns, each times an odd number that depends on its position, modulo 2**64."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.contiguous().view(-1).view(words)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), _HASH_BLOCK):
        block = flat[start : start + _HASH_BLOCK].long()
        place = torch.arange(start, start + block.numel(), device=tensor.device)
        total += (block * (place * 0x9E3779B97F4A7C1 | 1)).sum()
    return int(total)


def _texts(state: TrainerState) -> dict[str, str]:
    rest = {key: value for key, value in asdict(state).items() if key != "config"}
    return {
        _CONFIG: yaml.safe_dump(state.config, sort_keys=False, allow_unicode=True),
        _STATE: json.dumps({"versions": _versions(), **rest}),
    }


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to("cpu", copy=True) for name, value in tensors.items()}


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
