from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_scale.config import ModelConfig
from llava_scale.data.dataset import open_dataset
from llava_scale.model import build_model

COLORS = ("red", "green", "blue", "yellow")


def picture(color: str, seed: int) -> bytes:
    base = np.array(Image.new("RGB", (24, 20), color), dtype=np.int16)
    noisy = base + np.random.default_rng(seed).integers(-30, 30, base.shape)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def records() -> list[tuple[dict[str, Any], list[bytes]]]:
    """Sixteen questions of one picture, four of two, four without, and eight captions."""
    made: list[tuple[dict[str, Any], list[bytes]]] = []
    for i in range(16):
        color = COLORS[i % 4]
        turns = [("human", "<image>\nWhat color is it?"), ("gpt", color)]
        turns += [("human", "Is it a square?"), ("gpt", "yes" if i % 4 else "no")]
        made.append(({"task": "color", "turns": turns}, [picture(color, i)]))
    for i in range(4):
        turns = [("human", "<image>"), ("gpt", "seen"), ("human", "<image> Are they the same?"), ("gpt", "no")]
        made.append(({"task": "compare", "turns": turns}, [picture(COLORS[i], i), picture(COLORS[i - 1], i)]))
    made += [({"task": "text", "turns": [("human", f"Say {color}."), ("gpt", color)]}, []) for color in COLORS]
    for i in range(8):
        caption = f"a {'large' if i > 3 else 'small'} {COLORS[i % 4]} picture"
        made.append(
            ({"task": "caption", "turns": [("human", "<image>"), ("gpt", caption)]}, [picture(COLORS[i % 4], i)])
        )
    return made


def write_shard(folder: Path, broken: tuple[int, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "shard-00000.tar", "w") as tar:
        for i, (record, pictures) in enumerate(records()):
            conversations = [{"from": who, "value": text} for who, text in record["turns"]]
            content = {"id": f"{i:04d}", "conversations": conversations, "task": record["task"]}
            _add(tar, f"{i:04d}.json", json.dumps(content).encode())
            for number, data in enumerate(pictures):
                _add(tar, f"{i:04d}.{number}.png", data[: 60 if i in broken else None])
    return folder


@pytest.fixture(scope="session")
def tiny():
    model, processor = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=0)
    return model.requires_grad_(False), processor


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    return write_shard(folder / "test"), str(folder / "cache")


@pytest.fixture(scope="session")
def dataset(shards):
    return open_dataset(str(shards[0]), cache_dir=shards[1])


@pytest.fixture
def dataset_with_broken(tmp_path):
    return open_dataset(str(write_shard(tmp_path / "broken", broken=(0, 30))), cache_dir=str(tmp_path / "cache"))
