"""SmolLM2-135M-Instruct from its GGUF file as a normal checkpoint folder.

Run as a program of its own (``convert`` below starts it), so that the packages that reading GGUF needs stay out of
the process that trains.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from llava_scale.errors import CheckpointError

PROBE = "The capital of France is"
PROBE_ANSWER = "Paris"


def convert(gguf: Path, target: Path, *, packages: Path) -> None:
    """Write the model in ``gguf`` as a checkpoint folder of transformers to ``target``, once.

    Args:
        gguf: File of a model that transformers can read from GGUF.
        target: Folder that appears when it is whole.
        packages: Folder with the packages ``gguf`` and ``accelerate``.

    Raises:
        CheckpointError: the file cannot be converted, or the model that comes out does not know ``PROBE_ANSWER``.
    """
    if target.exists():
        return
    path = os.pathsep.join([str(packages.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(Path(__file__).resolve()), str(gguf.resolve()), str(target.resolve())]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        problem = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise CheckpointError(f"{gguf} could not be converted: {problem[0]}")


def save_dequantised(gguf: Path, target: Path) -> None:
    """Read a GGUF file and save its model in float32 with its tokenizer.

    transformers refuses to save a model that it has loaded from GGUF, so the weights move into a fresh one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    partial = target.with_name(f"{target.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    check_model(partial)
    partial.rename(target)


def check_model(folder: Path) -> str:
    """Return how the model continues ``PROBE``.

    Raises:
        CheckpointError: the continuation lacks ``PROBE_ANSWER``: the weights are not those of a language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(PROBE, return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    text = str(tokenizer.decode(generated[0], skip_special_tokens=True))
    if PROBE_ANSWER not in text:
        raise CheckpointError(f"{folder}: the model says {text!r}; it does not know {PROBE_ANSWER}")
    return text


if __name__ == "__main__":
    save_dequantised(Path(sys.argv[1]), Path(sys.argv[2]))
