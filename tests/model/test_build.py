from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    Qwen3NextConfig,
)

from llava_scale.config import ModelConfig, ProjectorConfig
from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.model import (
    LlavaScaleForConditionalGeneration,
    LlavaScaleProcessor,
    build_model,
    load_model,
    row_inputs,
)
from llava_scale.model.build import grow_vocabulary
from llava_scale.model.presets import tiny_tokenizer
from tests.model.parts import (
    DECODERS,
    TEXT,
    TOWERS,
    packed_row,
    picture_sample,
    pictures,
    save_decoder,
    save_tower,
)


def named(tmp_path, tower="clip", decoder="llama", **fields):
    return ModelConfig(
        language_model=save_decoder(tmp_path / "decoder", decoder),
        vision_tower=save_tower(tmp_path / "tower", tower),
        **fields,
    )


def loss_of(model):
    row = packed_row([picture_sample(model, [5], [7, 8]), ([20, 21], [20, 21])], pictures(model, 1))
    return model(**row_inputs(row)).loss


def same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("tower", TOWERS)
def test_towers_and_language_models_by_name_keep_their_weights(tmp_path, tower, decoder):
    config = named(tmp_path, tower, decoder)
    model, processor = build_model(config, chat_template="vicuna_v1", seed=0)
    weights = load_file(tmp_path / "decoder" / "model.safetensors")
    ours = model.language_model.state_dict()
    old = weights["model.embed_tokens.weight"].shape[0]
    assert weights
    for name, value in weights.items():
        kept = ours[name][:old] if value.shape[0] == old else ours[name]
        assert torch.equal(kept, value), name
    tower_weights = load_file(tmp_path / "tower" / "model.safetensors")
    last = next(reversed([v for n, v in sorted(tower_weights.items()) if n.endswith("1.mlp.fc2.weight")]), None)
    assert last is None or any(torch.equal(last, value) for value in model.vision_tower.state_dict().values())
    assert torch.isfinite(loss_of(model))
    assert processor.image_num_tokens == 16


def test_parameter_names_begin_with_their_part(tiny):
    model, _ = tiny
    parts = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert parts == {"vision_tower", "projector", "language_model"}
    assert {"projector.0.weight", "projector.2.bias"} <= set(model.state_dict())


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_generator(tiny):
    model, _ = tiny
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again, _ = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=0)
    assert torch.equal(torch.rand(3), expected)
    other, _ = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=1)
    assert same_weights(model, again)
    assert not same_weights(model, other)


def test_a_checkpoint_gives_the_same_model_through_the_auto_classes(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded, LlavaScaleForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), LlavaScaleProcessor)
    assert same_weights(model, loaded)
    assert torch.equal(loss_of(model), loss_of(loaded))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("decoder", DECODERS)
def test_load_model_brings_everything_back(tmp_path, decoder):
    config = named(tmp_path, decoder=decoder, projector=ProjectorConfig(input_norm=True))
    model, processor = build_model(config, chat_template="plain", seed=0)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    loaded, its_processor = load_model(tmp_path / "ours")
    assert same_weights(model, loaded)
    assert torch.equal(loss_of(model), loss_of(loaded))
    assert not loaded.training
    assert its_processor.chat_encoder.fingerprint() == processor.chat_encoder.fingerprint()
    assert its_processor.token_counter == processor.token_counter
    assert its_processor.image_transform == processor.image_transform
    half, _ = load_model(tmp_path / "ours", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_a_fresh_interpreter_loads_a_checkpoint_after_importing_the_package(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code = (
        "import sys, llava_scale.model; from transformers import AutoModelForImageTextToText as A, AutoProcessor as P;"
        "print(type(A.from_pretrained(sys.argv[1])).__name__, type(P.from_pretrained(sys.argv[1])).__name__)"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["LlavaScaleForConditionalGeneration", "LlavaScaleProcessor"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("projector.0.weight"), "1 missing keys, first 'projector.0.weight'"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 unexpected keys, first 'extra'"),
        (lambda w: w.update({"projector.0.bias": torch.zeros(3)}), "projector.0.bias"),
    ],
)
def test_loading_is_strict(tiny, tmp_path, change, message):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(tmp_path / "nothing")


def test_a_second_stage_goes_on_from_a_checkpoint_with_another_template(tmp_path):
    first, processor = build_model(ModelConfig(preset="tiny"), chat_template="plain", seed=0)
    with torch.no_grad():
        first.projector.get_submodule("0").weight.add_(1.0)
    first.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    second, its_processor = build_model(ModelConfig(init_from=str(tmp_path)), chat_template="native", seed=9)
    fresh = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=0)[1]
    assert same_weights(first, second)
    assert second.config.chat_template_name == "native"
    assert its_processor.chat_encoder.fingerprint() == fresh.chat_encoder.fingerprint()
    assert processor.chat_encoder.fingerprint() != fresh.chat_encoder.fingerprint()
    with pytest.raises(ConfigError, match="beside it only torch_dtype, compressor, video"):
        build_model(ModelConfig(init_from=str(tmp_path), image_size=32), chat_template="plain", seed=0)


def test_placeholders_get_rows_at_the_mean_of_the_embeddings(tmp_path):
    model, processor = build_model(named(tmp_path, decoder="qwen2"), chat_template="native", seed=0)
    old = load_file(tmp_path / "decoder" / "model.safetensors")
    for layer, name in (
        (model.get_input_embeddings(), "model.embed_tokens.weight"),
        (model.get_output_embeddings(), "lm_head.weight"),
    ):
        before = old[name]
        assert layer.weight.shape[0] % 64 == 0
        assert torch.allclose(layer.weight[before.shape[0] :], before.mean(0), atol=1e-6)
    assert model.config.text_config.vocab_size == model.get_input_embeddings().weight.shape[0]
    ids = [model.config.image_token_id, model.config.video_token_id, model.config.audio_token_id]
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["<image>", "<video>", "<audio>"]
    assert processor.tokenizer("a<image>b", add_special_tokens=False)["input_ids"].count(ids[0]) == 1


def test_embeddings_with_room_are_left_alone(tmp_path):
    folder = save_decoder(tmp_path / "decoder")
    config = LlamaConfig(**TEXT, vocab_size=len(tiny_tokenizer()) + 3)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    before = model.get_input_embeddings().weight
    grow_vocabulary(model, len(AutoTokenizer.from_pretrained(folder)) + 3)
    assert model.get_input_embeddings().weight is before


def test_a_missing_padding_token_becomes_one_of_its_own(tmp_path):
    config = named(tmp_path)
    fields = json.loads((tmp_path / "decoder" / "tokenizer_config.json").read_text())
    del fields["pad_token"]
    (tmp_path / "decoder" / "tokenizer_config.json").write_text(json.dumps(fields))
    assert AutoTokenizer.from_pretrained(tmp_path / "decoder").pad_token is None
    model, processor = build_model(config, chat_template="native", seed=0)
    tokenizer = processor.tokenizer
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token == "<|end|>"


def test_matching_the_embedding_scale_sets_the_size_of_picture_tokens(tmp_path):
    plain, _ = build_model(named(tmp_path), chat_template="native", seed=0)
    scaled_config = ProjectorConfig(match_embedding_scale=True)
    scaled, _ = build_model(named(tmp_path, projector=scaled_config), chat_template="native", seed=0)

    def rms(tensor):
        return float(tensor.detach().pow(2).mean().sqrt())

    wanted = rms(scaled.get_input_embeddings().weight)
    assert rms(scaled.get_image_features(pictures(scaled, 4))) == pytest.approx(wanted, rel=0.2)
    assert rms(plain.get_image_features(pictures(plain, 4))) != pytest.approx(wanted, rel=1.0)


def test_sixteen_bit_weights(tmp_path):
    model, _ = build_model(named(tmp_path, torch_dtype="bfloat16"), chat_template="native", seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(loss_of(model))
    model.save_pretrained(tmp_path / "ours")
    assert {value.dtype for value in load_file(tmp_path / "ours" / "model.safetensors").values()} == {torch.bfloat16}


class Blocks(nn.Module):
    """Tower of the user's own, with a constant that no checkpoint holds."""

    hidden_size, image_size = 6, 16
    image_mean = image_std = (0.5, 0.5, 0.5)

    def __init__(self, patch: int = 4) -> None:
        super().__init__()
        self.patch = patch
        self.widen = nn.Linear(3, 6)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch, width // self.patch

    def forward(self, pixels):
        return self.scale * self.widen(nn.functional.avg_pool2d(pixels, self.patch).flatten(2).transpose(1, 2))


def test_a_tower_by_import_path_is_built_saved_and_loaded(tmp_path):
    config = ModelConfig(
        language_model=save_decoder(tmp_path / "decoder"),
        vision_tower=f"{__name__}:Blocks",
        vision_tower_kwargs={"patch": 8},
    )
    model, processor = build_model(config, chat_template="native", seed=0)
    assert processor.image_num_tokens == 4
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    loaded, _ = load_model(tmp_path / "ours")
    assert same_weights(model, loaded)
    assert torch.equal(loaded.vision_tower.model.scale, torch.tensor([2.0]))
    assert torch.equal(loss_of(model), loss_of(loaded))


def test_an_option_without_effect_on_such_a_tower_is_a_warning(tmp_path, caplog):
    config = ModelConfig(
        language_model=save_decoder(tmp_path / "decoder"),
        vision_tower=f"{__name__}:Blocks",
        vision_feature_layer=-1,
    )
    build_model(config, chat_template="native", seed=0)
    assert "model.vision_feature_layer has no effect" in caplog.text
    assert "vision_feature_select" not in caplog.text


@pytest.mark.parametrize("config", [GraniteConfig(**TEXT, logits_scaling=7.0), CohereConfig(**TEXT, logit_scale=0.3)])
def test_factors_on_the_logits_are_honoured(tmp_path, config):
    from transformers import AutoModelForCausalLM

    folder = save_decoder(tmp_path / "decoder")
    config.vocab_size = len(tiny_tokenizer())
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model, _ = build_model(
        ModelConfig(language_model=folder, vision_tower=save_tower(tmp_path / "tower")),
        chat_template="native",
        seed=0,
    )
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, model.language_model(input_ids=ids).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma2Config(**TEXT, head_dim=6), "soft-capped"),
        (MambaConfig(hidden_size=24, num_hidden_layers=1, state_size=4), "linear_attention layers"),
        (
            Qwen3NextConfig(**TEXT, layer_types=["linear_attention", "full_attention"], head_dim=8),
            "linear_attention layers, which cannot keep packed samples apart",
        ),
    ],
)
def test_language_models_that_cannot_be_packed_are_refused(tmp_path, config, message):
    from transformers import AutoModelForCausalLM

    folder = save_decoder(tmp_path / "decoder")
    config.vocab_size = len(tiny_tokenizer())
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(ConfigError, match=message):
        build_model(
            ModelConfig(language_model=folder, vision_tower=save_tower(tmp_path / "tower")),
            chat_template="native",
            seed=0,
        )


def test_a_config_without_a_tower_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs both language_model and vision_tower"):
        build_model(ModelConfig(language_model="somewhere"), chat_template="native", seed=0)
    with pytest.raises(ConfigError, match=r"cannot be (loaded|read)"):
        build_model(
            ModelConfig(language_model=str(tmp_path / "x"), vision_tower=str(tmp_path / "y")),
            chat_template="native",
            seed=0,
        )


def test_arguments_for_a_tower_that_takes_none_are_refused():
    with pytest.raises(ConfigError, match="vision_tower_kwargs is for a tower by import path"):
        build_model(ModelConfig(preset="tiny", vision_tower_kwargs={"a": 1}), chat_template="native", seed=0)
