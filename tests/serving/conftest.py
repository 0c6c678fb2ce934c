from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from llava_scale.config import ModelConfig
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
