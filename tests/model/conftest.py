from __future__ import annotations

import pytest

from llava_scale.config import ModelConfig
from llava_scale.model import build_model


@pytest.fixture(scope="session")
def _tiny():
    return build_model(ModelConfig(preset="tiny"), chat_template="native", seed=0)


@pytest.fixture
def tiny(_tiny):
    """The tiny preset in evaluation mode, without gradients; leave its weights alone."""
    model, processor = _tiny
    model.eval().zero_grad(set_to_none=True)
    model.requires_grad_(True)
    return model, processor
