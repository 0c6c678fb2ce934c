"""Tiny checkpoints in the hub's format, and rows laid out by hand."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from llava_scale.model.presets import tiny_tokenizer
from llava_scale.types import IGNORE_INDEX, PackedRow

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TOWERS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(**VISION)),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**VISION)),
    "dinov2": (Dinov2Model, Dinov2Config(**VISION, mlp_ratio=2)),
    "vit": (ViTModel, ViTConfig(**VISION)),
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DECODERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**TEXT, tie_word_embeddings=False)),
}


def save_tower(folder, name="clip"):
    """A tower with random weights, as a hub folder."""
    model_class, config = TOWERS[name]
    torch.manual_seed(11)
    model_class(config).save_pretrained(folder)
    return str(folder)


def save_decoder(folder, name="llama"):
    """A language model with random weights and its tokenizer, as a hub folder."""
    model_class, config = DECODERS[name]
    tokenizer = tiny_tokenizer()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(12)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def packed_row(samples, pixel_values=None, **fields):
    """Row of (token ids, labels) samples."""
    lengths = [len(ids) for ids, _ in samples]
    offsets = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    return PackedRow(
        input_ids=torch.tensor([token for ids, _ in samples for token in ids]),
        labels=torch.tensor([label for _, labels in samples for label in labels]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seq_lens=torch.tensor(offsets, dtype=torch.int32),
        pixel_values=pixel_values,
        **fields,
    )


def picture_sample(model, before, answer):
    """Tokens ``before``, one picture, ``answer``; only the answer is supervised."""
    ids = [*before, *[model.config.image_token_id] * model.vision_tower.num_tokens, *answer]
    return ids, [IGNORE_INDEX] * (len(ids) - len(answer)) + list(answer)


def pictures(model, count, seed=0):
    """uint8 noise in the model's size."""
    generator = torch.Generator().manual_seed(seed)
    side = model.config.image_size
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
