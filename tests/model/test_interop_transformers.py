from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from llava_scale.config import ModelConfig
from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.model import build_model, load_model
from llava_scale.model.interop import ExportSettings, ImportSettings, export_checkpoint, import_checkpoint
from tests.model.foreign import prompt_with_picture, save_transformers_llava

TO = ExportSettings(to="transformers")


@pytest.fixture(params=["clip-llama", "siglip-qwen2", "clip-llama-tied"])
def known(request, tmp_path):
    vision, text, *tied = request.param.split("-")
    model = save_transformers_llava(tmp_path / "hf", vision=vision, text=text, tied=bool(tied))
    assert import_checkpoint(tmp_path / "hf", tmp_path / "ours") == "transformers"
    return model, tmp_path


def logits(model, ids, pixels, rows):
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits[..., :rows]


def test_an_imported_model_gives_the_same_logits(known):
    model, folder = known
    ours, processor = load_model(folder / "ours")
    ids, pixels = prompt_with_picture(model.config.image_token_id)
    rows = model.config.text_config.vocab_size
    wanted = logits(model, ids, pixels, rows)
    assert (logits(ours, ids, pixels, rows) - wanted).abs().max() < 1e-5
    assert wanted.std() > 0.1
    assert processor.image_num_tokens == 16
    assert processor.chat_template_name == "native"


def test_a_round_trip_keeps_names_tensors_files_and_answers(known):
    model, folder = known
    export_checkpoint(folder / "ours", folder / "back", TO)
    assert (folder / "back" / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    again, report = LlavaForConditionalGeneration.from_pretrained(folder / "back", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.config.vision_feature_layer == model.config.vision_feature_layer
    assert (folder / "back/tokenizer.json").read_bytes() == (folder / "hf/tokenizer.json").read_bytes()
    assert answers(model, folder / "hf") == answers(again, folder / "back")


def answers(model, folder):
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.effect_noise((40, 24), 90).convert("RGB").resize((40, 24))
    picture.putdata([(index % 251, index % 7 * 30, 255 - index % 90) for index in range(40 * 24)])
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is the color?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=picture, return_tensors="pt")
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()


def test_a_model_of_ours_exports_to_what_transformers_computes_alike(known):
    model, folder = known
    shutil.rmtree(folder / "ours" / "imported")  # as if it had been trained here
    export_checkpoint(folder / "ours", folder / "out", TO)
    exported, report = LlavaForConditionalGeneration.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert exported.config.vision_feature_layer == -1
    ids, pixels = prompt_with_picture(model.config.image_token_id)
    rows = model.config.text_config.vocab_size
    assert (logits(exported, ids, pixels, rows) - logits(model, ids, pixels, rows)).abs().max() < 1e-5
    assert all(".vision_model." in name for name in stored(folder / "out") if name.startswith("vision_tower."))
    ours, processor = load_model(folder / "ours")
    picture = Image.linear_gradient("L").resize((30, 12)).convert("RGB")
    exported_processor = AutoProcessor.from_pretrained(folder / "out")
    content = [{"type": "image"}, {"type": "text", "text": "hi"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    one, other = (
        processor(text=text, images=picture),
        exported_processor(text=text, images=picture, return_tensors="pt"),
    )
    assert one["input_ids"].tolist() == other["input_ids"].tolist()
    with torch.no_grad():
        pixels = ours.vision_tower.normalize(one["pixel_values"], torch.float32)
    assert (pixels - other["pixel_values"]).abs().max() < 0.05  # rounding of 8-bit resizing


def stored(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_exports_load_in_transformers_4(tmp_path, vision):
    if not (_version_4() / "transformers" / "__init__.py").is_file():
        pytest.skip("transformers 4.57 is not there: pip install --no-deps --target DIR 'transformers==4.57.*' "
                    "'tokenizers<0.23' 'huggingface_hub<1', then TRANSFORMERS_4=DIR")  # fmt: skip
    model = save_transformers_llava(tmp_path / "hf", vision=vision)
    import_checkpoint(tmp_path / "hf", tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours" / "imported")
    export_checkpoint(tmp_path / "ours", tmp_path / "out", TO)
    ids, pixels = prompt_with_picture(model.config.image_token_id)
    torch.save({"ids": ids, "pixels": pixels}, tmp_path / "inputs.pt")
    environment = {**os.environ, "PYTHONPATH": str(_version_4()), "TRANSFORMERS_VERBOSITY": "error"}
    script = str(Path(__file__).with_name("version_4.py"))
    done = subprocess.run(
        [sys.executable, script, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    rows = model.config.text_config.vocab_size
    assert (found["logits"][..., :rows] - logits(model, ids, pixels, rows)).abs().max() < 1e-5
    _, processor = load_model(tmp_path / "ours")
    picture = Image.linear_gradient("L").resize((30, 12)).convert("RGB")
    assert (
        found["input_ids"].tolist()
        == processor(text="<|user|><image>\nhi<|end|>", images=picture)["input_ids"].tolist()
    )


def _version_4() -> Path:
    return Path(os.environ.get("TRANSFORMERS_4", "/nowhere"))


def test_our_checkpoints_load_through_the_auto_class_without_remote_code(tmp_path):
    save_transformers_llava(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "ours", ImportSettings(dtype="bfloat16"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert type(model).__name__ == "LlavaScaleForConditionalGeneration"
    assert model.dtype == torch.bfloat16


def test_what_other_formats_cannot_hold_is_named(tmp_path):
    model, processor = build_model(
        ModelConfig(preset="tiny", compressor={"type": "token_merging", "ratio": 0.5}), chat_template="native", seed=0
    )
    model.save_pretrained(tmp_path / "merging")
    processor.save_pretrained(tmp_path / "merging")
    for to in ("llava", "transformers", "gguf"):
        with pytest.raises(ConfigError, match="compresses its visual tokens"):
            export_checkpoint(tmp_path / "merging", tmp_path / "out", ExportSettings(to=to))
    assert not (tmp_path / "out").exists()


def test_a_model_that_hears_is_refused_by_every_format(tmp_path):
    model, processor = build_model(ModelConfig(preset="tiny", audio_tower="tiny"), chat_template="native", seed=0)
    assert model.config.audio is not None
    model.save_pretrained(tmp_path / "hearing")
    processor.save_pretrained(tmp_path / "hearing")
    for to in ("llava", "transformers", "gguf"):
        with pytest.raises(ConfigError, match="this model hears"):
            export_checkpoint(tmp_path / "hearing", tmp_path / "out", ExportSettings(to=to))


def test_wrong_sources_and_targets_are_refused(tmp_path):
    save_transformers_llava(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="import takes folders of the original LLaVA"):
        import_checkpoint(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already"):
        import_checkpoint(tmp_path / "hf", tmp_path)
    with pytest.raises(CheckpointError, match="holds no model of llava-scale"):
        export_checkpoint(tmp_path / "hf", tmp_path / "out", TO)
    fields = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**fields, "vision_feature_layer": [-2, -3]}))
    with pytest.raises(ConfigError, match="joins several layers"):
        import_checkpoint(tmp_path / "hf", tmp_path / "out")
    deeper = {**fields, "text_config": {**fields["text_config"], "num_hidden_layers": 1}}
    (tmp_path / "hf/config.json").write_text(json.dumps(deeper))
    with pytest.raises(CheckpointError, match=r"have no place in the model, first .*layers\.1"):
        import_checkpoint(tmp_path / "hf", tmp_path / "out")
    deeper = {**fields, "text_config": {**fields["text_config"], "num_hidden_layers": 3}}
    (tmp_path / "hf/config.json").write_text(json.dumps(deeper))
    with pytest.raises(CheckpointError, match="weights are missing or of another shape"):
        import_checkpoint(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown --to"):
        ExportSettings(to="onnx")
    with pytest.raises(ConfigError, match="hold adapters merged"):
        ExportSettings(to="gguf", lora="apart")
