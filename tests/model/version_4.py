"""Run by the test of exports under transformers 4: load, compute, write what was found."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder = Path(sys.argv[1])
assert transformers.__version__.startswith("4."), transformers.__version__
model, report = LlavaForConditionalGeneration.from_pretrained(folder / "out", output_loading_info=True)
assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
inputs = torch.load(folder / "inputs.pt", weights_only=True)
processor = AutoProcessor.from_pretrained(folder / "out")
picture = Image.linear_gradient("L").resize((30, 12)).convert("RGB")
with torch.no_grad():
    logits = model.eval()(input_ids=inputs["ids"], pixel_values=inputs["pixels"]).logits
made = processor(text="<|user|><image>\nhi<|end|>", images=picture, return_tensors="pt")
torch.save({"logits": logits, "input_ids": made["input_ids"]}, folder / "found.pt")
