"""Tiny checkpoints in the layouts of other tools."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_scale.data.templates import CONTENT_PARTS
from llava_scale.model.presets import CHAT_TEMPLATE, tiny_tokenizer
from tests.model.parts import TEXT, VISION

VISIONS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
TEXTS = {"llama": LlamaConfig, "qwen2": Qwen2Config}
NUM_TOKENS = 16


def scattered(model, seed=3):
    """Weights far enough from zero and one that every one of them counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_transformers_llava(folder, *, vision="clip", text="llama", tied=False):
    """A random LLaVA as transformers saves it, with its processor; return the model."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    strategy = "default" if vision == "clip" else "full"
    config = LlavaConfig(
        vision_config=VISIONS[vision](**VISION),
        text_config=TEXTS[text](**TEXT, vocab_size=len(tokenizer), rope_theta=5000.0, tie_word_embeddings=tied),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=NUM_TOKENS,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    model = scattered(LlavaForConditionalGeneration(config))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    side = VISION["image_size"]
    LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size=side, do_pad=True, do_center_crop=False),
        tokenizer,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(vision == "clip"),
        chat_template=CONTENT_PARTS + CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return model


def save_original_llava(folder, *, has_vision=True, projector="mlp2x_gelu", **fields):
    """A random checkpoint in the layout of the original LLaVA-1.5; return its tensors."""
    tower = folder / "tower"
    vision = scattered(CLIPVisionModel(CLIPVisionConfig(**VISION)))
    vision.save_pretrained(tower)
    tokenizer = llama_like_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    language_model = scattered(LlamaForCausalLM(LlamaConfig(**text)), seed=4)
    width = {"linear": [("", VISION["hidden_size"])]}.get(
        projector, [("0.", VISION["hidden_size"]), ("2.", TEXT["hidden_size"])]
    )
    state = dict(language_model.state_dict())
    generator = torch.Generator().manual_seed(5)
    for number, size in width:
        state[f"model.mm_projector.{number}weight"] = torch.randn(TEXT["hidden_size"], size, generator=generator)
        state[f"model.mm_projector.{number}bias"] = torch.randn(TEXT["hidden_size"], generator=generator)
    if has_vision:
        prefix = "model.vision_tower.vision_tower.vision_model."
        state |= {prefix + name.removeprefix("vision_model."): value for name, value in vision.state_dict().items()}
        state[f"{prefix}embeddings.position_ids"] = torch.arange(NUM_TOKENS + 1)[None]
    config = {
        **text,
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "image_aspect_ratio": "pad",
        "mm_projector_type": projector,
        "mm_vision_tower": str(tower),
        "mm_hidden_size": VISION["hidden_size"],
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return state


def llama_like_tokenizer():
    """Byte-fallback BPE with merges, as Llama's; ids 0 to 2 are ``<unk>``, ``<s>``, ``</s>``."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyzUSERANTI:.",
    ]
    merges = [("▁", "a"), ("i", "s"), ("t", "h"), ("th", "e"), ("▁", "the")]
    pieces = list(dict.fromkeys([*pieces, *("".join(pair) for pair in merges)]))
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def gpt_like_tokenizer(template=CHAT_TEMPLATE):
    """Byte-level BPE with merges, as GPT-2's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    pieces = [*letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<pad>", chat_template=template
    )


def prompt_with_picture(image_token, *, seed=0):
    """Token ids with a picture in the middle, and normalised pixels."""
    ids = torch.tensor([[5, *[image_token] * NUM_TOKENS, 7, 8, 9]])
    side = VISION["image_size"]
    return ids, torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
