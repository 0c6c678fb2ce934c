from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llava_scale.config import ModelConfig
from llava_scale.errors import ConfigError, MissingExtraError
from llava_scale.model import build_model
from llava_scale.model.interop import ExportSettings, export_checkpoint
from llava_scale.model.interop_gguf import _rope_factors
from tests.model.foreign import gpt_like_tokenizer, llama_like_tokenizer, save_original_llava, scattered
from tests.model.parts import TEXT, save_tower

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'llava-scale[gguf]'")


def checkpoint(folder, *, text="llama", tied=True, tokenizer="gpt", tower="clip", projector="mlp2x_gelu"):
    """A checkpoint of ours with a language model that llama.cpp knows."""
    words = gpt_like_tokenizer() if tokenizer == "gpt" else llama_like_tokenizer()
    fields = {**TEXT, "vocab_size": len(words), "tie_word_embeddings": tied, "rope_theta": 5000.0}
    kinds = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
    model_class, config_class = kinds[text]
    scattered(model_class(config_class(**fields))).save_pretrained(folder / "text")
    words.save_pretrained(folder / "text")
    config = ModelConfig(
        language_model=str(folder / "text"),
        vision_tower=save_tower(folder / "tower", tower),
        projector={"type": projector},
    )
    template = "native" if tokenizer == "gpt" else "vicuna_v1"
    model, processor = build_model(config, chat_template=template, seed=0)
    scattered(model).save_pretrained(folder / "ours")
    processor.save_pretrained(folder / "ours")
    return model, processor


def read(path):
    """Fields and tensors of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {item.name: torch.from_numpy(np.array(item.data)) for item in reader.tensors}
    return fields, tensors


@pytest.mark.parametrize(
    ("text", "tied", "tokenizer"), [("llama", True, "gpt"), ("llama", False, "sentencepiece"), ("qwen2", False, "gpt")]
)
def test_the_language_model_reads_back_with_the_same_logits(tmp_path, text, tied, tokenizer):
    model, processor = checkpoint(tmp_path, text=text, tied=tied, tokenizer=tokenizer)
    export_checkpoint(tmp_path / "ours", tmp_path / "out", ExportSettings(to="gguf", gguf_type="f32"))
    name = "language-model-f32.gguf"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=name).eval()
    ids = torch.tensor([[5, 9, 3, 40, 7, 2]])
    with torch.no_grad():
        wanted, found = model(input_ids=ids).logits, again(input_ids=ids).logits
    assert (wanted - found).abs().max() < 1e-5
    assert wanted.std() > 0.1
    fields, tensors = read(tmp_path / "out" / name)
    assert fields["general.architecture"] == text
    assert fields[f"{text}.rope.freq_base"] == 5000.0
    assert ("output.weight" in tensors) is not tied
    assert fields["tokenizer.chat_template"] == processor.chat_template
    assert len(fields["tokenizer.ggml.tokens"]) == tensors["token_embd.weight"].shape[0]
    assert fields["tokenizer.ggml.tokens"][model.config.image_token_id] == "<image>"
    assert fields["tokenizer.ggml.token_type"][model.config.image_token_id] == 3


def test_the_tokenizer_reads_back_with_the_same_ids(tmp_path):
    _, processor = checkpoint(tmp_path)
    export_checkpoint(tmp_path / "ours", tmp_path / "out", ExportSettings(to="gguf"))
    again = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="language-model-f16.gguf")
    text = "the theory of the thing, 12 times"
    assert again(text)["input_ids"] == processor.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_tower_and_projector_compute_alike_from_the_file(tmp_path, tower):
    model, _ = checkpoint(tmp_path, tower=tower)
    export_checkpoint(tmp_path / "ours", tmp_path / "out", ExportSettings(to="gguf", gguf_type="f32"))
    fields, tensors = read(tmp_path / "out" / "mmproj-f32.gguf")
    side = model.config.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.get_image_features(pixels)
    assert (llama_cpp_graph(fields, tensors, pixels) - wanted).abs().max() < 1e-4
    assert fields["clip.projector_type"] == "mlp"
    assert fields["clip.vision.image_mean"] == pytest.approx(model.config.image_mean)


def llama_cpp_graph(fields, tensors, pixels):
    """The LLaVA graph of llama.cpp's clip.cpp, from its names."""
    linear, norm = torch.nn.functional.linear, torch.nn.functional.layer_norm
    width, heads = fields["clip.vision.embedding_length"], fields["clip.vision.attention.head_count"]
    eps = fields["clip.vision.attention.layer_norm_epsilon"]

    def get(name):
        return tensors.get(name)

    def apply_norm(x, name):
        return norm(x, (width,), get(f"{name}.weight"), get(f"{name}.bias"), eps)

    patches = fields["clip.vision.patch_size"]
    x = torch.nn.functional.conv2d(pixels, get("v.patch_embd.weight"), get("v.patch_embd.bias"), stride=patches)
    x = x.flatten(2).transpose(1, 2)
    has_class = get("v.class_embd") is not None
    if has_class:
        x = torch.cat([get("v.class_embd").expand(len(x), 1, -1), x], 1)
    x = x + get("v.position_embd.weight")
    x = apply_norm(x, "v.pre_ln") if get("v.pre_ln.weight") is not None else x
    for block in range(fields["clip.vision.feature_layer"][0]):
        at = f"v.blk.{block}"
        hidden = apply_norm(x, f"{at}.ln1")
        split = [linear(hidden, get(f"{at}.attn_{part}.weight"), get(f"{at}.attn_{part}.bias"))
                 .unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv"]  # fmt: skip
        seen = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        x = x + linear(seen, get(f"{at}.attn_out.weight"), get(f"{at}.attn_out.bias"))
        hidden = linear(apply_norm(x, f"{at}.ln2"), get(f"{at}.ffn_up.weight"), get(f"{at}.ffn_up.bias"))
        gelu = torch.nn.functional.gelu(hidden, approximate="tanh")
        hidden = gelu if fields["clip.use_gelu"] else hidden * torch.sigmoid(1.702 * hidden)
        x = x + linear(hidden, get(f"{at}.ffn_down.weight"), get(f"{at}.ffn_down.bias"))
    x = x[:, int(has_class) :]
    x = torch.nn.functional.gelu(linear(x, get("mm.0.weight"), get("mm.0.bias")))
    return linear(x, get("mm.2.weight"), get("mm.2.bias"))


def test_half_precision_keeps_vectors_whole(tmp_path):
    checkpoint(tmp_path)
    export_checkpoint(tmp_path / "ours", tmp_path / "out", ExportSettings(to="gguf"))
    for name in ("language-model-f16.gguf", "mmproj-f16.gguf"):
        fields, tensors = read(tmp_path / "out" / name)
        assert fields["general.file_type"] == 1
        for tensor_name, value in tensors.items():
            whole = value.ndim < 2 or "position_embd" in tensor_name
            assert value.dtype == (torch.float32 if whole else torch.float16), tensor_name
    assert "llama-mtmd-cli" in (tmp_path / "out/README.md").read_text()


def test_what_llama_cpp_cannot_hold_is_named(tmp_path):
    to = ExportSettings(to="gguf")
    checkpoint(tmp_path, projector="linear")
    with pytest.raises(ConfigError, match="would compute wrongly"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to)
    model, processor = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=0)
    model.save_pretrained(tmp_path / "unigram")
    processor.save_pretrained(tmp_path / "unigram")
    with pytest.raises(ConfigError, match="needs a BPE tokenizer"):
        export_checkpoint(tmp_path / "unigram", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_stretched_positions_are_those_of_transformers():
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    config = LlamaConfig(hidden_size=128, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=512)
    stretched = LlamaForCausalLM(
        LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8})
    )
    plain = 1 / 10000.0 ** (torch.arange(0, 32, 2) / 32)
    assert torch.allclose(plain / _rope_factors(config), stretched.model.rotary_emb.inv_freq)
    config.rope_parameters = {**rope, "rope_type": "yarn"}
    with pytest.raises(ConfigError, match="not yarn"):
        _rope_factors(config)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    checkpoint(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"llava-scale\[gguf\]"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", ExportSettings(to="gguf"))


def test_an_imported_llava_goes_to_llama_cpp(tmp_path):
    from llava_scale.model.interop import import_checkpoint

    save_original_llava(tmp_path / "llava")
    import_checkpoint(tmp_path / "llava", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "out", ExportSettings(to="gguf"))
    fields, _ = read(tmp_path / "out/language-model-f16.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
