"""The recipes for video, sound and both start, one after the other, on checkpoints of the same formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_scale.config import load_config
from llava_scale.data.toy.samples import write_toy
from llava_scale.data.write import pack
from llava_scale.model import build_model
from llava_scale.model.presets import tiny_tokenizer
from llava_scale.training.trainer import dry_run

ROOT = Path(__file__).parents[2]
BEATS = ROOT / "tests" / "data" / "audio" / "beats_tiny_released_layout.pt"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Stand-ins in the formats of CLIP, SigLIP, Qwen2 and Vicuna, and shards of all modalities."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**{**SIZES, "num_hidden_layers": 3}, image_size=336, patch_size=14)
    CLIPVisionModel(vision).save_pretrained(folder / "clip")
    sharper = SiglipVisionConfig(**{**SIZES, "num_hidden_layers": 3}, image_size=384, patch_size=14)
    SiglipVisionModel(sharper).save_pretrained(folder / "siglip")
    tokenizer = tiny_tokenizer()
    for name in ("qwen", "vicuna"):
        tokenizer.save_pretrained(folder / name)
    sizes = {**SIZES, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(folder / "qwen")
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "vicuna")
    for name in ("video", "audio", "video_audio"):
        toy = folder / f"toy-{name}"
        write_toy(toy, num_samples=6, num_test=1, seed=1, modalities=(name,))
        pack(toy / "train.json", folder / name, media_root=toy)
    return folder


def settings_of(name, parts, *changes, data=""):
    """The recipe on the stand-ins."""
    return load_config(
        ROOT / "configs" / f"{name}.yaml",
        [
            f"data.sources=[{{path: {parts / (data or name)}}}]",
            f"data.cache_dir={parts / 'cache'}",
            f"train.output_dir={parts / 'run'}",
            "data.num_workers=0",
            "train.device=cpu",
            "train.steps=2",
            "train.rows_per_step=1",
            *changes,
        ],
    )


def saved(config, folder):
    """The model that such a run would leave, untrained."""
    model, processor = build_model(config.model, chat_template=config.data.chat_template, seed=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_each_recipe_starts_on_what_the_one_before_it_leaves(parts):
    own = [f"model.language_model={parts / 'qwen'}", f"model.vision_tower={parts / 'clip'}"]
    video = settings_of("video", parts, *own)
    summary, batch = dry_run(video)
    assert {module.name for module in summary.modules if module.num_trainable} >= {"projector", "language_model"}
    assert set(batch.rows[0].video_num_tokens) == {8 * 12 * 12}

    seeing = saved(video, parts / "seeing")
    audio = settings_of("audio", parts, f"model.init_from={seeing}", f"model.audio_tower={BEATS}")
    summary, batch = dry_run(audio)
    trained = {module.name for module in summary.modules if module.num_trainable}
    assert {name for name in trained if not name.startswith("audio_")} == set()
    assert "audio_projector" in trained
    assert min(batch.rows[0].audio_num_tokens) > 0

    hearing = saved(audio, parts / "hearing")
    both = settings_of("video_audio", parts, f"model.init_from={hearing}")
    summary, batch = dry_run(both)
    trained = {module.name for module in summary.modules if module.num_trainable}
    assert trained >= {"audio_tower", "audio_projector", "projector", "language_model"}
    assert "vision_tower" not in trained
    assert batch.rows[0].video_num_tokens
    assert batch.rows[0].audio_num_tokens


def test_the_recipe_with_siglip_says_the_time_of_each_frame(parts):
    own = [f"model.language_model={parts / 'vicuna'}", f"model.vision_tower={parts / 'siglip'}"]
    config = settings_of("video_siglip", parts, *own, data="video")
    _, batch = dry_run(config)
    row = batch.rows[0]
    assert set(row.video_num_tokens) == {16 * 14 * 14}
    assert set(row.video_grids) == {(16, 27, 27)}
    assert len(row.input_ids) <= config.data.packing.row_length
