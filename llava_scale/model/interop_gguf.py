"""Checkpoints of ours as GGUF files for llama.cpp: the language model, and tower with projector as "mmproj" file.

Names and keys are those that llama.cpp documents and reads (``tools/mtmd/clip.cpp``, ``gguf-py``). Two facts of it
shape this file. Llama-like language models have the rows of query and key weights in the order of interleaved rotary
positions. And its LLaVA graph puts a GELU behind a first layer in any case, so that a projector of one layer cannot be
written; features are taken behind the block that ``clip.vision.feature_layer`` names, without the tower's final norm.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_scale.errors import ConfigError, MissingExtraError
from llava_scale.model.interop_files import State
from llava_scale.model.interop_gguf_tokenizer import write_tokenizer
from llava_scale.model.interop_vision import PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llava_scale.model.interop_plan import Exportable

GGUF_TYPES = ("f16", "f32")

_FAMILIES = ("llama", "qwen2")
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_VISION_BLOCK = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_VISION_TOP = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_WHOLE = ("v.position_embd.weight",)
"""Added to activations in full precision, so never stored in less."""
_ACTIVATIONS = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}
"""Whether ``clip.use_gelu`` is set; without it the tower uses CLIP's own quick GELU."""


def write_gguf(source: Exportable, folder: Path, *, file_type: str = "f16") -> tuple[Path, Path]:
    """Write ``language-model-TYPE.gguf`` and ``mmproj-TYPE.gguf`` into ``folder`` and return their paths.

    Args:
        source: What to write.
        folder: Where to.
        file_type: ``f16`` or ``f32``, of matrices; vectors are always f32.

    Raises:
        ConfigError: something in the model has no place in llama.cpp.
        MissingExtraError: the package ``gguf`` is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf") from None
    if file_type not in GGUF_TYPES:
        raise ConfigError(f"unknown GGUF type {file_type!r}; choose {' or '.join(GGUF_TYPES)} (quantise in llama.cpp)")
    _check(source)
    text, vision = folder / f"language-model-{file_type}.gguf", folder / f"mmproj-{file_type}.gguf"
    writer = gguf.GGUFWriter(text, source.config.text_config.model_type)
    _describe_text(writer, source, file_type)
    write_tokenizer(writer, source.processor, num_rows=_embeddings(source.state).shape[0])
    _write(writer, text_tensors(source), file_type)
    writer = gguf.GGUFWriter(vision, "clip")
    _describe_vision(writer, source, file_type)
    _write(writer, vision_tensors(source), file_type)
    return text, vision


def text_tensors(source: Exportable) -> State:
    """Weights of the language model by llama.cpp's names."""
    config, prefix = source.config.text_config, "language_model.model."
    tensors: State = {}
    for name, value in source.state.items():
        if name == "language_model.lm_head.weight":
            if not source.config.tie_word_embeddings:
                tensors["output.weight"] = value
        elif name == f"{prefix}embed_tokens.weight":
            tensors["token_embd.weight"] = value
        elif name == f"{prefix}norm.weight":
            tensors["output_norm.weight"] = value
        elif name.startswith(f"{prefix}layers."):
            number, _, rest = name.removeprefix(f"{prefix}layers.").partition(".")
            part, _, kind = rest.rpartition(".")
            if part not in _BLOCK:
                raise ConfigError(f"llama.cpp has no place for {name} in models of type {config.model_type}")
            tensors[f"blk.{number}.{_BLOCK[part]}.{kind}"] = _in_order(value, part, config)
    factors = _rope_factors(config)
    return tensors if factors is None else {**tensors, "rope_freqs.weight": factors}


def vision_tensors(source: Exportable) -> State:
    """Weights of vision tower and projector by llama.cpp's names."""
    tensors: State = {}
    for name, value in source.state.items():
        if name.startswith("projector."):
            tensors[f"mm.{name.removeprefix('projector.')}"] = value
        if not name.startswith(PREFIX):
            continue
        inner = name.removeprefix(PREFIX).removeprefix("vision_model.")
        if inner in _VISION_TOP:
            tensors[_VISION_TOP[inner]] = value
        elif inner.startswith("encoder.layers."):
            number, _, rest = inner.removeprefix("encoder.layers.").partition(".")
            part, _, kind = rest.rpartition(".")
            tensors[f"v.blk.{number}.{_VISION_BLOCK[part]}.{kind}"] = value
        else:
            raise ConfigError(f"llama.cpp has no place for {name}")
    return tensors


def _check(source: Exportable) -> None:
    config = source.config
    family = config.text_config.model_type
    if family not in _FAMILIES:
        raise ConfigError(f"GGUF export knows language models of type {', '.join(_FAMILIES)}, not {family}")
    if config.text_config.hidden_act != "silu" or getattr(config.text_config, "use_sliding_window", False):
        raise ConfigError("GGUF export knows language models with SiLU and without a sliding window only")
    if config.projector["type"] != "mlp2x_gelu":
        raise ConfigError(
            f"llama.cpp's LLaVA graph has a projector of two layers with a GELU between (mlp2x_gelu), this model has "
            f"{config.projector['type']}, which it would compute wrongly"
        )
    if config.vision_feature_select != "patch":
        raise ConfigError("llama.cpp's LLaVA graph drops the class token; vision_feature_select must be 'patch'")
    if config.vision_config.hidden_act not in _ACTIVATIONS:
        raise ConfigError(f"llama.cpp has no vision tower with activation {config.vision_config.hidden_act}")
    if config.image_size != config.vision_config.image_size:
        raise ConfigError(
            f"model.image_size is {config.image_size}, but the tower was made for {config.vision_config.image_size}; "
            "llama.cpp does not interpolate its positions"
        )


def _describe_text(writer: Any, source: Exportable, file_type: str) -> None:
    import gguf

    config = source.config.text_config
    writer.add_name(source.path.resolve().name)
    writer.add_file_type(_file_type(file_type))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(_embeddings(source.state).shape[0])
    head_dim = _head_dim(config)
    writer.add_rope_dimension_count(head_dim)
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type", "default") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _describe_vision(writer: Any, source: Exportable, file_type: str) -> None:
    config = source.config.vision_config
    writer.add_type("mmproj")
    writer.add_name(source.path.resolve().name)
    writer.add_file_type(_file_type(file_type))
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_projection_dim(source.config.text_config.hidden_size)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_block_count(source.num_blocks)
    writer.add_array("clip.vision.feature_layer", [source.num_blocks])
    writer.add_vision_image_mean([float(value) for value in source.config.image_mean])
    writer.add_vision_image_std([float(value) for value in source.config.image_std])
    writer.add_vision_use_gelu(_ACTIVATIONS[config.hidden_act])


def _write(writer: Any, tensors: State, file_type: str) -> None:
    for name, value in tensors.items():
        small = value.ndim < 2 or name in _WHOLE or file_type == "f32"
        writer.add_tensor(name, value.to(torch.float32 if small else torch.float16).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _file_type(name: str) -> int:
    import gguf

    kinds = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
    return int(kinds[name])


def _embeddings(state: State) -> Tensor:
    return state["language_model.model.embed_tokens.weight"]


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _in_order(value: Tensor, part: str, config: PreTrainedConfig) -> Tensor:
    """Rows of Llama's query and key weights with the two halves of each head interleaved, as ggml rotates them."""
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    if config.model_type != "llama" or part not in heads:
        return value
    halves = value.reshape(heads[part], 2, -1, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def _rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """Divisors of Llama 3's stretched rotary frequencies; None where they are plain.

    Raises:
        ConfigError: a way of stretching that is not known here.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind in ("default", "linear"):
        return None
    if kind != "llama3":
        raise ConfigError(f"GGUF export knows rotary positions of type default, linear and llama3, not {kind}")
    width = _head_dim(config)
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    wavelength = 2 * math.pi / frequencies
    context = rope["original_max_position_embeddings"]
    low, high = context / rope["low_freq_factor"], context / rope["high_freq_factor"]
    share = (context / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    between = 1.0 / ((1 - share) / rope["factor"] + share)
    stretched = torch.where(wavelength > low, torch.full_like(wavelength, rope["factor"]), between)
    return torch.where(wavelength < high, torch.ones_like(wavelength), stretched)
