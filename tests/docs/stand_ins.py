"""What the commands of the documentation talk about, small: checkpoints, data, other tools' folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from llava_scale.config import load_config
from llava_scale.data.toy.samples import write_toy
from llava_scale.model import build_model
from tests.docs.pages import ROOT
from tests.model.foreign import gpt_like_tokenizer, save_original_llava, save_transformers_llava
from tests.model.parts import save_decoder, save_tower

Run = Callable[[str], str]
MERGING = "model.compressor={type: token_merging, ratio: 0.5}"
QUERIES = "model.compressor={type: qformer, num_queries: 4}"


def save_model(folder: Path, *fields: str, template: str = "native") -> None:
    """A random checkpoint."""
    model, processor = build_model(
        load_config(None, ["model.preset=tiny", *fields]).model, chat_template=template, seed=0
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_recipe(path: Path, shards: str, model: str = "{preset: tiny}") -> None:
    """A recipe on ``shards`` for rows that all samples fit in."""
    path.write_text(
        f"model: {model}\ndata: {{sources: [{{path: {shards}}}], packing: {{row_length: 1024}}}}\n"
        f"train: {{output_dir: runs/{path.stem}, steps: 2}}\n"
    )


def of_repository(folder: Path, run: Run) -> None:
    """Recipes and examples as in a clone."""
    for name in ("configs", "examples", "scripts"):
        (folder / name).symlink_to(ROOT / name)


def of_first_run(folder: Path, run: Run) -> None:
    """Data and a checkpoint as the quickstart leaves them."""
    of_repository(folder, run)
    write_toy(folder / "data/toy", num_samples=60, seed=0)
    run("llava-scale data pack data/toy/train.json data/train")
    run("llava-scale data pack data/toy/test.json data/test")
    save_model(folder / "runs/first/final")


def of_data(folder: Path, run: Run) -> None:
    """A LLaVA JSON with its pictures, enough for two parts."""
    write_toy(folder / "data/images", num_samples=300, seed=0, modalities=("image", "text"))
    shutil.copy(folder / "data/images/train.json", folder / "data/llava.json")


def of_compression(folder: Path, run: Run) -> None:
    """A run whose checkpoint merges, a picture, a clip, recipes with and without a model, three runs."""
    of_first_run(folder, run)
    save_model(folder / "RUN/final", MERGING)
    Image.linear_gradient("L").resize((60, 40)).save(folder / "picture.jpg")
    write_toy(folder / "clips", num_samples=10, seed=0, modalities=("video",))
    shutil.copy(next((folder / "clips").rglob("*.mp4")), folder / "clip.mp4")
    write_recipe(folder / "RECIPE.yaml", "data/train")
    write_recipe(folder / "INSTRUCT.yaml", "data/train", model="{}")
    recipe = "'data.sources=[{path: data/train}]' train.steps=2 train.log_every=1 train.save_every=0 train.eval_every=0"
    for name in "ABC":
        run(f"llava-scale train configs/quickstart.yaml {recipe} train.output_dir=RUN_{name}")


def of_evaluation(folder: Path, run: Run) -> None:
    """Shards of questions, and a second task file."""
    of_first_run(folder, run)
    shutil.copytree(folder / "data/test", folder / "shards/signs")
    (folder / "documents.yaml").write_text("data: shards/signs\nscorer: anls\nlimit: 4\n")


def of_interop(folder: Path, run: Run) -> None:
    """Checkpoints of other tools; parts of the hub as folders of the same names."""
    (folder / "path/to/llava-v1.5-7b").mkdir(parents=True)
    state = save_original_llava(folder / "path/to/llava-v1.5-7b")
    save_transformers_llava(folder / "path/to/llava-1.5-7b-hf")
    save_decoder(folder / "lmsys/vicuna-7b-v1.5")
    save_tower(folder / "openai/clip-vit-large-patch14-336")
    torch.save({name: value for name, value in state.items() if "mm_projector" in name}, folder / "mm_projector.bin")
    gpt_like_tokenizer().save_pretrained(folder / "lmsys/vicuna-7b-v1.5")  # GGUF is for byte pairs only
    parts = ("language_model", "lmsys/vicuna-7b-v1.5"), ("vision_tower", "openai/clip-vit-large-patch14-336")
    fields = [f"model.{name}={folder / part}" for name, part in parts]
    model, processor = build_model(load_config(None, fields).model, chat_template="native", seed=0)
    model.save_pretrained(folder / "runs/instruct/final")
    processor.save_pretrained(folder / "runs/instruct/final")


def of_scale(folder: Path, run: Run) -> None:
    """A recipe, and the configs of the parts that are estimated, which are read without weights."""
    of_first_run(folder, run)
    write_recipe(folder / "recipe.yaml", "data/train")
    llama = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
             "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048}  # fmt: skip
    sight = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
             "image_size": 224, "patch_size": 14}  # fmt: skip
    clip = {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model", **sight}, "text_config": {}}
    for name, fields in (("lmsys/vicuna-7b-v1.3", llama), ("openai/clip-vit-large-patch14", clip)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(fields))


def of_serving(folder: Path, run: Run) -> None:
    """A checkpoint and a picture."""
    save_model(folder / "RUN/final", MERGING)
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(folder / "cat.jpg")


STAND_INS: dict[str, Callable[[Path, Run], None]] = {
    "README.md": of_repository,
    "quickstart.md": of_repository,
    "install.md": of_repository,
    "data.md": of_data,
    "compression.md": of_compression,
    "evaluate.md": of_evaluation,
    "interop.md": of_interop,
    "own_parts.md": of_first_run,
    "scale.md": of_scale,
    "serve.md": of_serving,
    "video_audio.md": of_repository,
}
"""By page what its commands need beforehand."""


def before(command: str, folder: Path) -> None:
    """Exchange what a page speaks of in general for what one command of it needs; each command begins a new run."""
    if "train recipe.yaml" in command:
        shutil.rmtree(folder / "runs/recipe", ignore_errors=True)
    if "show windows" in command or "show attention" in command:
        shutil.rmtree(folder / "RUN/final")
        save_model(folder / "RUN/final", QUERIES)
