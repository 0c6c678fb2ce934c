from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from llava_scale.cli import build_app
from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.model import load_model
from llava_scale.training.trainer import train
from tests.model.foreign import save_transformers_llava
from tests.training.conftest import make_config, shards  # noqa: F401 (fixtures)


def invoke(*arguments: object):
    done = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_import_and_export_say_what_to_do_next(tmp_path):
    save_transformers_llava(tmp_path / "hf")
    done = invoke("import", tmp_path / "hf", tmp_path / "ours")
    assert "(transformers) is a model in" in done.stdout
    assert "llava-scale chat" in done.stdout
    done = invoke("export", tmp_path / "ours", tmp_path / "out", "--to", "transformers")
    assert "LlavaForConditionalGeneration.from_pretrained" in done.stdout
    assert (tmp_path / "out/README.md").is_file()
    with pytest.raises(ConfigError, match="unknown dtype 'int4'"):
        invoke("import", tmp_path / "hf", tmp_path / "other", "--dtype", "int4")


@pytest.fixture
def adapted_run(make_config):  # noqa: F811
    pytest.importorskip("peft")
    config = make_config(lora={"rank": 2}, steps=2, learning_rate=1e-2)
    return train(config).final_dir


@pytest.mark.parametrize("to", ["transformers", "llava"])
def test_adapters_are_written_apart_and_give_the_merged_model(adapted_run, tmp_path, to):
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    invoke("export", adapted_run, tmp_path / "apart", "--to", to, "--lora", "apart")
    invoke("export", adapted_run, tmp_path / "merged", "--to", to)
    apart, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("apart", "merged"))
    differing = [name for name in merged if not torch.equal(apart[name], merged[name])]
    assert differing
    assert all("_proj" in name and "mm_proj" not in name for name in differing)
    adapter = load_file(tmp_path / "apart/adapter/adapter_model.safetensors")
    if to == "llava":
        assert all(name.startswith("base_model.model.model.layers.") for name in adapter)
        rest = torch.load(tmp_path / "apart/adapter/non_lora_trainables.bin", weights_only=True)
        assert "base_model.model.model.mm_projector.0.weight" in rest
        return
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "apart")
    joined = PeftModel.from_pretrained(base, str(tmp_path / "apart/adapter")).merge_and_unload().state_dict()
    whole = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.allclose(joined[name], whole[name], atol=1e-6) for name in whole)


def test_apart_needs_to_know_the_start(adapted_run, tmp_path):
    moved = tmp_path / "moved"
    adapted_run.rename(moved)
    with pytest.raises(CheckpointError, match="does not lie in a run folder"):
        invoke("export", moved, tmp_path / "out", "--to", "transformers", "--lora", "apart")
    (moved / "adapter").rename(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="has no adapters"):
        invoke("export", moved, tmp_path / "out", "--to", "transformers", "--lora", "apart")


def test_final_holds_a_card_and_exports_carry_it(make_config, tmp_path):  # noqa: F811
    final = train(make_config(steps=2)).final_dir
    text = (final / "README.md").read_text()
    assert "2 optimizer steps; loss" in text
    assert len(json.loads((final / "card.json").read_text())["stages"]) == 1
    invoke("export", final, tmp_path / "out", "--to", "transformers")
    exported = (tmp_path / "out/README.md").read_text()
    assert "2 optimizer steps; loss" in exported
    assert "library_name: transformers" in exported
    load_model(final)
