"""The folder of a run: who may start in it, what a resumed run may change, and its log.

::

    config.yaml     the resolved config
    log.jsonl       one line per logged step and evaluation
    skipped.jsonl   samples that could not be used
    checkpoints/    step-00000100/ ...
    health/         sign of life of each process, and its stacks where it was stuck
    profile/        traces and tables of profiled steps
    final/          the trained model and its processor, for ``from_pretrained``
"""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_scale.config import to_dict, to_yaml
from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.training.files import atomic_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llava_scale.config import Config

HARMLESS = (
    "name",
    "data.num_workers",
    "data.worker_type",
    "data.prefetch_rows",
    "data.cache_*",
    "data.max_bad_*",
    "data.eval_sources*",
    "data.sources.*.path",  # data that moved is fine: the loader's state proves that it is the same
    "data.sources.*.name",
    "data.features",  # a folder that moved; its fingerprint proves that it holds what the towers would make
    "train.output_dir",
    "train.max_bad_steps",
    "train.eval_*",
    "train.save_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.device",
    "train.compile",
    "train.parallel.*",
    "train.async_checkpoint",
    "train.stop_exit_code",
    "train.trackers",
    "train.profile",
    "train.peak_tflops",
    "train.heartbeat_s",
    "train.stuck_after_s",
)
"""Settings that a resumed run may change: none of them changes what is computed in a step, but for rounding."""


@dataclass(frozen=True)
class RunFolder:
    """Places inside a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        """One JSON object a line."""
        return self.path / "log.jsonl"

    @property
    def skipped(self) -> Path:
        """One JSON object per skipped sample."""
        return self.path / "skipped.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def health(self) -> Path:
        """Signs of life."""
        return self.path / "health"

    @property
    def profile(self) -> Path:
        """Traces and tables of profiled steps."""
        return self.path / "profile"

    @property
    def final(self) -> Path:
        """Folder of the finished model."""
        return self.path / "final"

    def check_startable(self, *, resume: bool) -> None:
        """Refuse to mix two runs in one folder.

        Raises:
            ConfigError: the folder holds something and ``resume`` is not set, or the path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"train.output_dir: {self.path} is a file; choose another folder")
        if not resume and self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(
                f"train.output_dir: {self.path} is not empty; continue the run in it with --resume, or start a new "
                "one with another train.output_dir=..."
            )

    def create(self, config: Config) -> None:
        """Make the folder and write the resolved config into it.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            atomic_text(self.config, to_yaml(config))
        except OSError as error:
            raise CheckpointError(
                f"cannot write into {self.path}: {error.strerror or error}; choose another train.output_dir"
            ) from None

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the whole lines of the log; what a killed process left half written is passed over."""
        yield from read_lines(self.log)

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the log's lines that hold an evaluation."""
        return [line for line in self.lines() if any(key.startswith("eval/") for key in line)]

    def rewind(self, step: int) -> None:
        """Drop what a resumed run will write again: log lines after ``step``, samples skipped in its batch or later.

        The log counts finished steps; the list of skipped samples names batches, from 0.
        """
        for path, last in ((self.log, step), (self.skipped, step - 1)):
            if path.exists():
                kept = [
                    json.dumps(line, ensure_ascii=False) + "\n" for line in read_lines(path) if line["step"] <= last
                ]
                atomic_text(path, "".join(kept))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a log, one a line; incomplete lines are passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line


def check_same_run(stored: dict[str, Any], config: Config, checkpoint: Path) -> None:
    """Refuse to continue a run under settings that would compute something else.

    Raises:
        ConfigError: lists the settings that differ and matter.
    """
    before, after = dict(_leaves(stored)), dict(_leaves(to_dict(config)))
    changed = [
        f"{key}: {before.get(key, 'not set')!r} -> {after.get(key, 'not set')!r}"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and not any(fnmatch.fnmatch(key, rule) for rule in HARMLESS)
    ]
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"these settings differ from the run in {checkpoint}:\n  {listed}\n"
            "put them back, or start a new run with another train.output_dir (model.init_from=... takes over a "
            "finished model)"
        )


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items: Iterator[tuple[Any, Any]]
    if isinstance(tree, dict) and tree:
        items = iter(tree.items())
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        items = iter(enumerate(tree))
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
