"""A released BEATs file as the ears of a whole model: through saving, loading, generating."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_scale.config import ModelConfig
from llava_scale.model import build_model, load_model, register_auto_classes
from llava_scale.towers.beats_checkpoint import load_beats

FILES = Path(__file__).parents[1] / "data" / "audio"


@pytest.fixture(scope="module", params=["released_layout", "prenorm", "finetuned"])
def heard(request, tmp_path_factory):
    """File, model with its processor, and the folder that they were saved in."""
    path = FILES / f"beats_tiny_{request.param}.pt"
    config = ModelConfig(preset="tiny", audio_tower=str(path))
    model, processor = build_model(config, chat_template="native", seed=0)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return path, model.eval(), processor, folder


def inputs_of(processor):
    sounds = [torch.sin(torch.arange(number) * 0.05).numpy() for number in (16_000, 7_000)]
    return processor(["<audio> what?", "<audio> which?"], audio=sounds, return_tensors="pt")


def test_the_tower_has_the_weights_of_the_file(heard):
    path, model, _, _ = heard
    expected = load_beats(path).state_dict()
    found = model.audio_tower.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("auto", [False, True])
def test_a_saved_model_is_loaded_as_it_was(heard, auto):
    _, model, processor, folder = heard
    if auto:
        register_auto_classes()
        again, reader = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    else:
        again, reader = load_model(folder)
    again.eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    inputs, other = inputs_of(processor), inputs_of(reader)
    assert all(torch.equal(inputs[name], other[name]) for name in ("input_ids", "audio_values", "audio_lengths"))
    told = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(**other, max_new_tokens=4, do_sample=False), told)
