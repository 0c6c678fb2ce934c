from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.model import load_model
from llava_scale.model.interop import ExportSettings, ImportSettings, export_checkpoint, import_checkpoint
from tests.model.foreign import prompt_with_picture, save_original_llava
from tests.model.parts import TEXT, save_decoder, save_tower

TO = ExportSettings(to="llava")


def original_logits(state, folder, ids, pixels):
    """What the original computes: CLIP's second last hidden state, MLP, spliced into Llama."""
    tower = CLIPVisionModel.from_pretrained(folder / "tower").eval()
    rows = state["model.embed_tokens.weight"].shape[0]
    language_model = LlamaForCausalLM(LlamaConfig(**{**TEXT, "vocab_size": rows}, rms_norm_eps=1e-5)).eval()
    language_model.load_state_dict({k: v for k, v in state.items() if k in language_model.state_dict()})
    with torch.no_grad():
        features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        names = ("0.", "2.") if "model.mm_projector.0.weight" in state else ("",)
        for number, name in enumerate(names):
            features = torch.nn.functional.gelu(features) if number else features
            layer = f"model.mm_projector.{name}"
            features = torch.nn.functional.linear(features, state[f"{layer}weight"], state[f"{layer}bias"])
        is_text = ids < rows
        embeds = language_model.get_input_embeddings()(ids.clamp(max=rows - 1))
        embeds[~is_text] = features[0]
        return language_model(inputs_embeds=embeds).logits


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("has_vision", [True, False])
def test_a_round_trip_keeps_names_and_tensors_and_the_model_computes_alike(tmp_path, projector, has_vision):
    source = tmp_path / "llava"
    state = save_original_llava(source, projector=projector, has_vision=has_vision)
    assert import_checkpoint(source, tmp_path / "ours") == "llava"
    ours, processor = load_model(tmp_path / "ours")
    assert processor.chat_template_name == "vicuna_v1"
    ids, pixels = prompt_with_picture(ours.config.image_token_id)
    rows = state["model.embed_tokens.weight"].shape[0]
    assert ours.config.image_token_id >= rows
    with torch.no_grad():
        found = ours(input_ids=ids, pixel_values=pixels).logits[..., :rows]
    assert (found - original_logits(state, source, ids, pixels)).abs().max() < 1e-5
    export_checkpoint(tmp_path / "ours", tmp_path / "back", TO)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_a_model_without_a_past_is_written_with_its_tower_and_comes_back(tmp_path):
    save_original_llava(tmp_path / "llava")
    import_checkpoint(tmp_path / "llava", tmp_path / "ours")
    (tmp_path / "ours" / "imported").rename(tmp_path / "forgotten")
    export_checkpoint(tmp_path / "ours", tmp_path / "out", TO)
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert (fields["mm_vision_tower"], fields["mm_vision_select_layer"]) == ("vision_tower", -1)
    assert (fields["model_type"], fields["mm_hidden_size"], fields["image_aspect_ratio"]) == ("llava_llama", 16, "pad")
    import_checkpoint(tmp_path / "out", tmp_path / "again")
    ids, pixels = prompt_with_picture(load_model(tmp_path / "ours")[0].config.image_token_id)
    with torch.no_grad():
        one, other = (
            load_model(tmp_path / name)[0](input_ids=ids, pixel_values=pixels).logits for name in ("ours", "again")
        )
    assert torch.equal(one, other)
    named = ExportSettings(to="llava", vision_tower="openai/clip-vit-large-patch14-336")
    export_checkpoint(tmp_path / "ours", tmp_path / "named", named)
    fields = json.loads((tmp_path / "named/config.json").read_text())
    assert (fields["mm_vision_tower"], fields["mm_vision_select_layer"]) == ("openai/clip-vit-large-patch14-336", -2)
    assert not (tmp_path / "named/vision_tower").exists()


def test_llava_to_transformers_keeps_the_whole_tower(tmp_path):
    state = save_original_llava(tmp_path / "llava")
    import_checkpoint(tmp_path / "llava", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "hf", ExportSettings(to="transformers"))
    import_checkpoint(tmp_path / "hf", tmp_path / "again")
    fields = json.loads((tmp_path / "hf/config.json").read_text())
    assert fields["vision_feature_layer"] == -2
    assert fields["vision_config"]["num_hidden_layers"] == 3
    stored = load_file(tmp_path / "hf/model.safetensors")
    name = "encoder.layers.2.mlp.fc1.weight"
    assert torch.equal(stored[f"vision_tower.vision_model.{name}"],
                       state[f"model.vision_tower.vision_tower.vision_model.{name}"])  # fmt: skip


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector."])
def test_a_projector_alone_is_put_between_named_models(tmp_path, prefix):
    tower, decoder = save_tower(tmp_path / "tower"), save_decoder(tmp_path / "decoder")
    generator = torch.Generator().manual_seed(1)
    weights = {"0.weight": (24, 16), "0.bias": (24,), "2.weight": (24, 24), "2.bias": (24,)}
    state = {prefix + name: torch.randn(shape, generator=generator) for name, shape in weights.items()}
    torch.save(state, tmp_path / "mm_projector.bin")
    settings = ImportSettings(language_model=decoder, vision_tower=tower, chat_template="native")
    assert import_checkpoint(tmp_path / "mm_projector.bin", tmp_path / "ours", settings) == "projector"
    model, _ = load_model(tmp_path / "ours")
    assert torch.equal(model.projector.get_parameter("2.weight"), state[f"{prefix}2.weight"])
    export_checkpoint(tmp_path / "ours", tmp_path / "out", ExportSettings(to="llava", projector_only=True))
    back = torch.load(tmp_path / "out/mm_projector.bin", weights_only=True)
    assert {name.removeprefix("model.") for name in back} == {name.removeprefix("model.") for name in state}
    with pytest.raises(ConfigError, match="name the models on both sides"):
        import_checkpoint(tmp_path / "mm_projector.bin", tmp_path / "other")
    torch.save({f"{prefix}0.weight": torch.ones(3, 3), f"{prefix}2.weight": torch.ones(3, 3)}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="does not fit between"):
        import_checkpoint(tmp_path / "a.bin", tmp_path / "other", settings)


class Code:
    def __reduce__(self):
        return print, ("must not run",)


def test_pickled_code_is_never_run(tmp_path, capsys):
    (tmp_path / "mm_projector.bin").write_bytes(pickle.dumps({"mm_projector.0.weight": Code()}))
    settings = ImportSettings(language_model="a", vision_tower="b")
    with pytest.raises(CheckpointError, match=r"mm_projector\.bin"):
        import_checkpoint(tmp_path / "mm_projector.bin", tmp_path / "out", settings)
    assert "must not run" not in capsys.readouterr().out


def test_sharded_and_pickled_weights_are_read(tmp_path):
    state = save_original_llava(tmp_path / "llava")
    (tmp_path / "llava/model.safetensors").unlink()
    names = sorted(state)
    halves = {"a.bin": names[:30], "b.bin": names[30:]}
    for file, members in halves.items():
        torch.save({name: state[name] for name in members}, tmp_path / "llava" / file)
    index = {"weight_map": {name: file for file, members in halves.items() for name in members}}
    (tmp_path / "llava/pytorch_model.bin.index.json").write_text(json.dumps(index))
    import_checkpoint(tmp_path / "llava", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", TO)
    assert load_file(tmp_path / "back/model.safetensors").keys() == state.keys()
    outside = {"weight_map": {"x": "../../etc/passwd"}}
    (tmp_path / "llava/pytorch_model.bin.index.json").write_text(json.dumps(outside))
    with pytest.raises(CheckpointError, match="no file of this folder"):
        import_checkpoint(tmp_path / "llava", tmp_path / "other")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres' is not supported"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True is not supported"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type='spatial_unpad' is not supported"),
        ({"mm_projector_type": "resampler"}, "mm_projector_type 'resampler' is not supported"),
        ({"model_type": "llava_mpt"}, "model_type 'llava_mpt' is not supported"),
    ],
)
def test_variants_that_we_do_not_have_are_named(tmp_path, fields, message):
    save_original_llava(tmp_path / "llava", **fields)
    with pytest.raises(ConfigError, match=message):
        import_checkpoint(tmp_path / "llava", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_weights_that_belong_nowhere_are_named(tmp_path):
    state = save_original_llava(tmp_path / "llava")
    save_file({**state, "model.image_newline": torch.ones(3)}, tmp_path / "llava/model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 weights have no place in the model, first 'model.image_newline'"):
        import_checkpoint(tmp_path / "llava", tmp_path / "ours")
