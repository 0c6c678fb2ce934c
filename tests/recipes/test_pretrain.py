"""The recipes of the original's two scripts: their settings, and that they start on checkpoints of the same formats."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from llava_scale.config import load_config
from llava_scale.model.presets import tiny_tokenizer

ROOT = Path(__file__).parents[2]
NAMES = ("pretrain_tome", "pretrain_qformer")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Stand-ins in the formats of CLIP (both towers in one checkpoint) and Vicuna, and shards of captions."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    vision = {**sizes, "hidden_size": 32, "num_hidden_layers": 3, "image_size": 224, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(folder / "vicuna")
    tokenizer.save_pretrained(folder / "vicuna")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "shard-00000.tar", "w") as tar:
        for number in range(160):
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a red circle"}]
            picture = io.BytesIO()
            Image.new("RGB", (30, 20), "red").save(picture, format="PNG")
            record = json.dumps({"id": str(number), "conversations": turns}).encode()
            for name, data in ((f"{number}.json", record), (f"{number}.png", picture.getvalue())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_are_the_originals(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    model, data, train = config.model, config.data, config.train
    assert (model.language_model, model.vision_tower) == ("lmsys/vicuna-7b-v1.3", "openai/clip-vit-large-patch14")
    assert (model.vision_feature_layer, model.vision_feature_select) == (-2, "patch")
    assert (data.chat_template, data.packing.samples_per_row * train.rows_per_step) == ("plain", 128)
    assert data.packing.row_length == 2048
    assert (train.stage, train.learning_rate, train.warmup_ratio, train.epochs) == ("align", 2e-3, 0.03, 1)
    assert (train.precision, train.gradient_checkpointing, train.min_lr_ratio) == ("bf16", True, 0)
    compressor = model.compressor
    if name == "pretrain_tome":
        assert (compressor.type, compressor.ratio, compressor.window) == ("token_merging", 0.5, (1, 2, 2))
        assert (compressor.ramp, compressor.warmup_steps) == ("cosine", 4000)
    else:
        assert (compressor.type, compressor.num_queries, compressor.window) == ("qformer", 64, 512)
        assert compressor.instruction_tower == "openai/clip-vit-large-patch14"


def start(name, parts, tmp_path, *arguments):
    """Output of the script on the stand-ins, with one process."""
    settings = [
        f"model.language_model={parts / 'vicuna'}",
        f"model.vision_tower={parts / 'clip'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"train.output_dir={tmp_path / 'run'}",
        "train.device=cpu",
        *([f"model.compressor.instruction_tower={parts / 'clip'}"] if name == "pretrain_qformer" else []),
        *(["model.compressor.num_heads=4"] if name == "pretrain_qformer" else []),
    ]
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "NUM_DEVICES": "1", "PATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
    command = [str(ROOT / "scripts" / f"{name}.sh"), str(parts / "shards"), *settings, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_script_starts(name, parts, tmp_path):
    done = start(name, parts, tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 rows, 128 samples" in done.stdout
    visual = 128 * (256 if name == "pretrain_tome" else 64)  # the ramp of merging begins at nothing
    assert f"{visual:,} visual" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_script_trains_and_says_how_it_is_called(parts, tmp_path):
    packing = ["data.packing.samples_per_row=4", "train.rows_per_step=1", "train.steps=2", "data.num_workers=0"]
    done = start("pretrain_qformer", parts, tmp_path, *packing)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    usage = subprocess.run([ROOT / "scripts" / "pretrain_tome.sh"], capture_output=True, text=True, check=False)
    assert usage.returncode != 0
    assert "usage:" in usage.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_first_batch_is_laid_out_with_the_promised_tokens(name, parts, tmp_path):
    from llava_scale.training.trainer import dry_run

    reader = [f"model.compressor.instruction_tower={parts / 'clip'}", "model.compressor.num_heads=4"]
    config = load_config(
        ROOT / "configs" / f"{name}.yaml",
        [
            f"model.language_model={parts / 'vicuna'}",
            f"model.vision_tower={parts / 'clip'}",
            f"data.sources=[{{path: {parts / 'shards'}}}]",
            f"data.cache_dir={tmp_path / 'cache'}",
            f"train.output_dir={tmp_path / 'run'}",
            "train.device=cpu",
            "data.packing.samples_per_row=2",
            *(reader if name == "pretrain_qformer" else []),
        ],
    )
    summary, batch = dry_run(config)
    trained = {module.name for module in summary.modules if module.num_trainable}
    assert trained == ({"projector"} if name == "pretrain_tome" else {"projector", "compressor"})
    expected = 256 if name == "pretrain_tome" else 64
    assert [row.image_num_tokens for row in batch.rows] == [(expected, expected)] * 8
