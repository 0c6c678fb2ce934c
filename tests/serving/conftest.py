from __future__ import annotations

import io
import random

import pytest
import torch
from PIL import Image

from llava_scale.config import ModelConfig
from llava_scale.data.toy.clips import SECONDS, render_clip
from llava_scale.data.toy.encoding import encode_sound, encode_video
from llava_scale.data.toy.sight_and_sound import draw_scene
from llava_scale.data.toy.sounds import render_sound
from llava_scale.model import build_model
from llava_scale.serving.engine import Engine


@pytest.fixture(scope="session")
def lively_parts():
    """A random model whose next token depends strongly on what came before."""
    model, processor = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed_tokens" not in name:
                parameter.mul_(4.0)
    return model, processor


@pytest.fixture
def engine(lively_parts):
    return Engine(*lively_parts)


def _png(color: str, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def png():
    """Bytes of a picture of one colour."""
    return _png


def _sight_and_sound(seed: int) -> tuple[bytes, bytes]:
    rng = random.Random(seed)
    scene = draw_scene(rng, "train")
    wave = render_sound(scene.notes, rng, 22_050, SECONDS)
    return encode_video(render_clip(scene.actors, rng), wave, 22_050), encode_sound(wave, "wav", 22_050)


@pytest.fixture(scope="session")
def sight_and_sound():
    """An mp4 with a sound track, and the same sound as a wav file, by a seed."""
    return _sight_and_sound
