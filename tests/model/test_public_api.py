from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image
from transformers import pipeline

import llava_scale
from llava_scale import model


def test_importing_the_package_alone_loads_no_torch():
    code = "import sys, llava_scale; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_model_is_reached_from_the_package():
    assert llava_scale.build_model is model.build_model
    assert llava_scale.LlavaScaleProcessor is model.LlavaScaleProcessor
    assert {"load_model", "register_auto_classes", "__version__"} <= set(dir(llava_scale))
    with pytest.raises(AttributeError, match="no attribute 'build_modle'"):
        llava_scale.build_modle  # noqa: B018


def test_a_checkpoint_works_in_a_pipeline_of_transformers(tiny, tmp_path):
    for part in tiny:
        part.save_pretrained(tmp_path)
    answer = pipeline("image-text-to-text", model=str(tmp_path))
    picture = {"type": "image", "image": Image.new("RGB", (30, 50), "red")}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "what color is this ?"}]}]
    shown = answer(text=messages, max_new_tokens=4, return_full_text=False)
    assert isinstance(shown[0]["generated_text"], str)


def test_lora_trains_and_merges(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    import torch

    from llava_scale.model import load_model, row_inputs
    from tests.model.parts import packed_row, picture_sample, pictures

    for part in tiny:
        part.save_pretrained(tmp_path)
    base, _ = load_model(tmp_path)
    config = peft.LoraConfig(r=2, target_modules=r"language_model.*\.(q_proj|v_proj)", modules_to_save=["projector"])
    adapted = peft.get_peft_model(base, config).train()
    row = packed_row([picture_sample(base, [5], [7, 8])], pictures(base, 1))
    adapted(**row_inputs(row)).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("lora_" in name for name in trained)
    assert any("projector" in name for name in trained)
    assert not any("vision_tower" in name for name in trained)
    merged = adapted.merge_and_unload()
    assert torch.isfinite(merged.eval()(**row_inputs(row)).loss)
