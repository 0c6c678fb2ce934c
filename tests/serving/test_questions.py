from __future__ import annotations

import pytest
import torch

from llava_scale.config import load_config
from llava_scale.model import build_model
from llava_scale.serving.engine import Engine, GenerationRequest
from llava_scale.types import Turn


@pytest.fixture(scope="module")
def engine():
    text = "model.compressor={type: qformer, num_queries: 4}"
    model, processor = build_model(load_config(None, ["model.preset=tiny", text]).model, chat_template="native", seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed_tokens" not in name:
                parameter.mul_(4.0)
    return Engine(model, processor)


def ask(text, *pictures):
    return GenerationRequest(turns=(Turn("user", text),), media={"image": pictures})


def test_a_model_that_reads_questions_gets_each_pictures_own(engine, png, monkeypatch):
    requests = [ask("what color is it?", png("red")), ask("<image> or <image>?", png("red"), png("blue")), ask("hello")]
    alone = [engine.generate([request], max_new_tokens=6)[0] for request in requests]
    assert engine.generate(requests, max_new_tokens=6) == alone
    read = []
    encode = type(engine.processor).encode_questions
    monkeypatch.setattr(
        type(engine.processor), "encode_questions", lambda self, texts: read.append(list(texts)) or encode(self, texts)
    )
    engine.generate(requests, max_new_tokens=1)
    assert sorted(read) == [["or ?"], ["what color is it?"]]
