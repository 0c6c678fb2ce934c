from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from llava_scale.errors import ConfigError, MissingExtraError
from llava_scale.model import load_model, row_inputs
from llava_scale.training.trainer import Trainer, dry_run, train

peft = pytest.importorskip("peft")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adapted(make_config, lora, **settings):
    return make_config(lora={"rank": 4, **lora}, steps=3, learning_rate=1e-2, **settings)


def logits(model, batch):
    with torch.no_grad():
        return [model(**{**row_inputs(row), "labels": None}).logits for row in batch.rows]


@pytest.fixture
def last_model(monkeypatch):
    """The model as it was trained, adapters and all."""
    seen = []
    write = Trainer._write_final

    def watched(self):
        seen.append(self.model)
        write(self)

    monkeypatch.setattr(Trainer, "_write_final", watched)
    return seen


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"dora": True},
        {"targets": r"language_model\..*(q|v)_proj|vision_tower\..*fc1"},
        pytest.param({"quantize": "nf4"}, marks=needs_bitsandbytes),
    ],
)
def test_a_merged_model_answers_as_the_adapted_one_did(make_config, last_model, lora):
    config = adapted(make_config, lora)
    _, batch = dry_run(config)
    result = train(config)
    expected = logits(last_model[0], batch)
    merged, _ = load_model(result.final_dir)
    assert not any(".lora_" in name for name in merged.state_dict())
    for wanted, found in zip(expected, logits(merged, batch), strict=True):
        # The four-bit kernel for inference on a CPU rounds its inputs to sixteen bits.
        assert torch.allclose(wanted, found, atol=5e-2 if "quantize" in lora else 1e-4)
    start, _ = build_parts_of(config)
    assert not torch.allclose(expected[0], logits(start, batch)[0], atol=0.1), "the adapters learned nothing"


def build_parts_of(config):
    from llava_scale.model import build_model

    return build_model(config.model, chat_template=config.data.chat_template, seed=config.seed)


def test_peft_reads_the_adapters_that_lie_beside_the_model(make_config, last_model):
    config = adapted(make_config, {"dora": True}, trainable={r"projector\.": 0.0})
    _, batch = dry_run(config)
    result = train(config)
    start, _ = build_parts_of(config)
    loaded = peft.PeftModel.from_pretrained(start, str(result.final_dir / "adapter")).eval()
    for wanted, found in zip(logits(last_model[0], batch), logits(loaded, batch), strict=True):
        assert torch.allclose(wanted, found, atol=1e-5)


def test_a_stopped_run_with_adapters_goes_on_to_the_last_bit(make_config, tmp_path):
    whole = adapted(make_config, {"dora": True, "dropout": 0.1}, output_dir=str(tmp_path / "whole"))
    train(whole)
    config = adapted(make_config, {"dora": True, "dropout": 0.1}, save_every=1)
    train(config)
    for name in ("final", "checkpoints/step-00000003"):
        remove(Path(config.train.output_dir) / name)
    train(config, resume=True)
    left, right = (load_model(Path(item.train.output_dir) / "final")[0].state_dict() for item in (whole, config))
    assert all(torch.equal(left[name], right[name]) for name in left)


def remove(folder):
    import shutil

    shutil.rmtree(folder)


def test_only_adapters_and_what_lies_before_the_language_model_are_trained_and_stored(make_config):
    config = adapted(make_config, {}, trainable={r".*lora_B": 5e-3})
    summary, _ = dry_run(config)
    modules = {module.name: module for module in summary.modules}
    assert modules["vision_tower"].num_trainable == 0
    assert modules["projector"].num_trainable == modules["projector"].num_parameters
    assert modules["language_model"].learning_rates == (1e-2, 5e-3)
    assert modules["language_model"].num_trainable < 0.2 * modules["language_model"].num_parameters


def test_settings_that_contradict_are_named(make_config):
    with pytest.raises(ConfigError, match="stage align leaves alone"):
        dry_run(adapted(make_config, {}, stage="align"))
    with pytest.raises(ConfigError, match=r"train\.lora\.dora needs adapters"):
        dry_run(make_config(lora={"dora": True}))
    with pytest.raises(ConfigError, match=r"'nothing' matches no layer in full; names look like 'language_model\."):
        dry_run(adapted(make_config, {"targets": "nothing"}))
    with pytest.raises(ConfigError, match=r"matches 'language_model', which is no linear layer"):
        dry_run(adapted(make_config, {"targets": "language_model"}))


def test_a_missing_peft_is_named_with_the_extra(make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"llava-scale\[lora\]"):
        dry_run(adapted(make_config, {}))
