"""TensorBoard, Weights & Biases and Trackio as trackers; each is an extra."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from llava_scale.errors import MissingExtraError
from llava_scale.training.trackers import Tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def make_trackers(
    names: Sequence[str], *, folder: Path, run_name: str, config: dict[str, Any], start_step: int
) -> list[Tracker]:
    """Trackers by name.

    Args:
        names: ``tensorboard``, ``wandb``, ``trackio``.
        folder: Run folder; TensorBoard's and W&B's files go below it.
        run_name: The run's name.
        config: The resolved config.
        start_step: Steps that lie behind; lines after it are replaced where the service can.

    Raises:
        MissingExtraError: the package of one is not installed.
    """
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoardTracker(folder / "tensorboard", start_step),
        "wandb": lambda: WandbTracker(folder, run_name, config),
        "trackio": lambda: TrackioTracker(folder, run_name, config),
    }
    return [makers[name]() for name in names]


class TensorBoardTracker(Tracker):
    """Scalars as event files.

    Args:
        folder: Where the event files go.
        start_step: Steps behind; what an earlier part of the run wrote after it is hidden.
    """

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("tensorboard", "track") from None
        self._writer: Any = SummaryWriter(str(folder), purge_step=start_step + 1)

    def log(self, line: dict[str, Any]) -> None:
        """Write the numbers of the line."""
        for name, value in _numbers(line).items():
            self._writer.add_scalar(_grouped(name), value, line["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbTracker(Tracker):
    """Weights & Biases; ``WANDB_MODE=offline`` keeps everything in the run folder. A resumed run continues its page.

    Args:
        folder: Run folder.
        name: Name of the run.
        config: The resolved config.
    """

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtraError("wandb", "track") from None
        self._run: Any = wandb.init(
            project="llava-scale",
            name=name,
            id=_stable_id(folder),
            resume="allow",
            dir=str(folder),
            config=config,
        )

    def log(self, line: dict[str, Any]) -> None:
        """Send the numbers of the line."""
        self._run.log({_grouped(name): value for name, value in _numbers(line).items()}, step=line["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TrackioTracker(Tracker):
    """Trackio, Hugging Face's local-first tracker. A resumed run continues its page.

    Args:
        folder: Run folder, whose path makes the run's name unique.
        name: Name of the run.
        config: The resolved config.
    """

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        try:
            import trackio
        except ImportError:
            raise MissingExtraError("trackio", "track") from None
        unique = f"{name}-{_stable_id(folder)}"
        self._run: Any = trackio.init(project="llava-scale", name=unique, config=config, resume="allow")

    def log(self, line: dict[str, Any]) -> None:
        """Store the numbers of the line."""
        self._run.log({_grouped(name): value for name, value in _numbers(line).items()}, step=line["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _grouped(name: str) -> str:
    """Names as dashboards group them: ``train/loss`` beside ``eval/loss``."""
    return name if "/" in name else f"train/{name}"


def _stable_id(folder: Path) -> str:
    """The same for every part of a run, another for a run in another folder."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
