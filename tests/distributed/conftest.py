from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.training.conftest import write_shards

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "train", num_samples=48, text_every=2)


@pytest.fixture(scope="session")
def all_media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of pictures, videos, sounds, videos with sound, and text alone."""
    from typer.testing import CliRunner

    from llava_scale.cli import build_app
    from llava_scale.data.toy.samples import write_toy

    folder = tmp_path_factory.mktemp("all_media")
    kinds = ("image", "text", "video", "audio", "video_audio")
    write_toy(folder, num_samples=40, num_test=1, seed=3, modalities=kinds)
    arguments = ["data", "pack", folder / "train.json", folder / "shards", "--media-root", folder]
    packed = CliRunner().invoke(build_app(), [*map(str, arguments)])
    assert packed.exit_code == 0, packed.output
    return folder / "shards"


@pytest.fixture
def make_tree(shards: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Config tree of a run in the folder ``name``: rows of one sample, so that some are text only."""

    def make(
        name: str, *, data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any
    ) -> dict[str, Any]:
        return {
            "seed": 7,
            "model": {"preset": "tiny", **(model or {})},
            "data": {
                "sources": [{"path": str(shards)}],
                "packing": {"row_length": 32, "lookahead_rows": 1},
                "num_workers": 0,
                "cache_dir": str(tmp_path / "cache"),
                **(data or {}),
            },
            "train": {
                "output_dir": str(tmp_path / name),
                "steps": 4,
                "rows_per_step": 4,
                "learning_rate": 1e-3,
                "precision": "fp32",
                "log_every": 1,
                "save_every": 0,
                "device": "cpu",
                "trainable": {r"vision_tower\.": 1e-4},
                **train,
            },
        }

    return make
