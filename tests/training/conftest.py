from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from llava_scale.config.load import parse_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from llava_scale.config import Config

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


def picture(color: str, seed: int) -> bytes:
    pixels = np.full((20, 24, 3), COLORS[color], dtype=np.int16)
    pixels += np.random.default_rng(seed).integers(-40, 40, pixels.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_shards(
    folder: Path, *, num_samples: int, num_shards: int = 2, broken: Iterable[int] = (), text_every: int = 5
) -> Path:
    """Pictures of one colour with a question about it; every ``text_every``-th sample is text only."""
    folder.mkdir(parents=True)
    broken = set(broken)
    for shard in range(num_shards):
        with tarfile.open(folder / f"shard-{shard:05d}.tar", "w") as tar:
            for number in range(shard, num_samples, num_shards):
                color = list(COLORS)[number % len(COLORS)]
                with_picture = number % text_every != text_every - 1
                question = "<image>\nWhat color is it?" if with_picture else f"Say {color}. " + "Now. " * (number % 7)
                turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {color}."}]
                key = f"{number:04d}"
                _add(tar, f"{key}.json", json.dumps({"id": key, "conversations": turns}).encode())
                if with_picture:
                    _add(tar, f"{key}.png", b"no picture" if number in broken else picture(color, number))
    return folder


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "train", num_samples=48)


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """Shards of one test; arguments as in ``write_shards``."""
    return lambda **arguments: write_shards(tmp_path / "own_shards", **arguments)


@pytest.fixture
def make_config(shards: Path, tmp_path: Path) -> Callable[..., Config]:
    """Config of a run of a few seconds; ``section={...}`` changes settings, ``data_path`` the shards."""

    def make(
        *,
        data_path: Path = shards,
        data: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        **train: Any,
    ) -> Config:
        tree = {
            "seed": 7,
            "model": {"preset": "tiny", **(model or {})},
            "data": {
                "sources": [{"path": str(data_path)}],
                "packing": {"row_length": 128},
                "num_workers": 1,
                "cache_dir": str(tmp_path / "cache"),
                **(data or {}),
            },
            "train": {
                "output_dir": str(tmp_path / "run"),
                "steps": 6,
                "rows_per_step": 2,
                "learning_rate": 1e-3,
                "precision": "fp32",
                "log_every": 1,
                "save_every": 2,
                "device": "cpu",
                **train,
            },
        }
        return parse_config(tree, origin="test")

    return make
