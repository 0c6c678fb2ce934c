"""Checkpoints of ours as checkpoints of the original LLaVA and of transformers' LLaVA."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava_scale.errors import ConfigError
from llava_scale.model.interop_files import State, read_json, write_json, write_state
from llava_scale.model.interop_names import to_llava, to_transformers
from llava_scale.model.interop_plan import Exportable, Source, rename_all
from llava_scale.model.interop_vision import PREFIX, WholeTower, plain_dict, select_strategy, whole_tower

_VERSION_5_ONLY = ("TokenizersBackend",)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


def write_transformers(source: Exportable, folder: Path) -> None:
    """Fill ``folder`` with a ``LlavaForConditionalGeneration`` that transformers 4.57 and 5 load in full.

    Raises:
        ConfigError: the projector is none that this class has.
    """
    if source.config.projector["type"] != "mlp2x_gelu":
        raise ConfigError(
            f"transformers' LLaVA has a projector of two layers (mlp2x_gelu), this model has "
            f"{source.config.projector['type']}; export it --to llava"
        )
    tower = whole_tower(source)
    state = rename_all(_without_tower(source.state), to_transformers, origin=str(source.path))
    state |= {f"vision_tower.vision_model.{name}": value for name, value in tower.state.items()}
    imported = _same_layout(source, "transformers")
    if imported is not None:
        state = _cut_vocabulary(state, imported.config.get("text_config", {}).get("vocab_size"))
    if source.config.tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)
    write_state(folder, state)
    if imported is not None:
        _copy_files(imported, folder)
        return
    write_json(folder / "config.json", _transformers_config(source, tower, state))
    _write_processor(source, tower, folder)
    _write_generation(source, folder)


def write_llava(source: Exportable, folder: Path, *, vision_tower: str = "") -> None:
    """Fill ``folder`` with a checkpoint as the original LLaVA reads it.

    Args:
        source: What to write.
        folder: An empty folder.
        vision_tower: Name of the tower under which the original finds it; empty writes the tower into
            ``vision_tower/`` of the folder, if the checkpoint was not imported with a name of it.

    Raises:
        ConfigError: the vision tower or language model is none that the original has.
    """
    family = source.config.text_config.model_type
    if source.config.vision_config.model_type != "clip_vision_model":
        raise ConfigError("the original LLaVA reads CLIP vision towers only; export --to transformers")
    if family not in ("llama", "mistral"):
        raise ConfigError(f"the original LLaVA has no language models of type {family}; export --to transformers")
    imported = _same_layout(source, "llava")
    single = source.config.projector["type"] in ("linear", "mlp1x_gelu")
    rename = partial(to_llava, single_layer=single)
    if imported is not None:
        state = rename_all(source.state, rename, origin=str(source.path)) | imported.unused
        if not imported.has_vision:
            state = {name: value for name, value in state.items() if ".vision_tower." not in name}
        write_state(folder, _cut_vocabulary(state, imported.config.get("vocab_size")))
        _copy_files(imported, folder)
        return
    tower = whole_tower(source)
    state = rename_all(_without_tower(source.state), rename, origin=str(source.path))
    state = {name: value for name, value in state.items() if not (_is_tied(source) and name == "lm_head.weight")}
    if not vision_tower:
        _write_tower(source, tower, folder / "vision_tower")
    write_state(folder, state)
    feature_layer = source.config.vision_feature_layer if vision_tower else tower.feature_layer
    write_json(folder / "config.json", _llava_config(source, vision_tower, feature_layer, state))
    source.processor.tokenizer.save_pretrained(folder)
    _for_version_4(folder / "tokenizer_config.json")
    _write_generation(source, folder)


def projector_file(source: Exportable, path: Path) -> None:
    """Write the projector alone as the original's ``mm_projector.bin``."""
    single = source.config.projector["type"] in ("linear", "mlp1x_gelu")
    state = {name: value for name, value in source.state.items() if name.startswith("projector.")}
    renamed = {to_llava(name, single_layer=single): value.clone() for name, value in state.items()}
    torch.save(renamed, path)


def _same_layout(source: Exportable, layout: str) -> Source | None:
    """What an import from ``layout`` kept; None for other checkpoints."""
    return source.source if source.source is not None and source.source.layout == layout else None


def _without_tower(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith(PREFIX)}


def _cut_vocabulary(state: State, num_rows: Any) -> State:
    """Drop embeddings behind the first ``num_rows``: those of placeholders that an import added."""
    if not isinstance(num_rows, int):
        return state
    is_table = ("embed_tokens.weight", "lm_head.weight")
    return {name: value[:num_rows] if name.endswith(is_table) else value for name, value in state.items()}


def _copy_files(imported: Source, folder: Path) -> None:
    assert imported.folder is not None
    for path in imported.folder.iterdir():
        if path.name not in ("source.json", "unused.safetensors"):
            shutil.copyfile(path, folder / path.name)


def _is_tied(source: Exportable) -> bool:
    return bool(source.config.tie_word_embeddings)


def _transformers_config(source: Exportable, tower: WholeTower, state: State) -> dict[str, Any]:
    config = source.config
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": _dtype_name(state),
        "image_seq_length": source.processor.image_num_tokens,
        "image_token_index": config.image_token_id,
        "multimodal_projector_bias": True,
        "pad_token_id": source.processor.tokenizer.pad_token_id,
        "projector_hidden_act": "gelu",
        "text_config": _text_config(source, state),
        "tie_word_embeddings": _is_tied(source),
        "vision_config": tower.config,
        "vision_feature_layer": tower.feature_layer,
        "vision_feature_select_strategy": select_strategy(source),
    }


def _text_config(source: Exportable, state: State) -> dict[str, Any]:
    """The language model's config with positions as versions 4 and 5 write them."""
    fields = {**source.config.text_config.to_dict(), **plain_dict(source.config.text_config)}
    fields = {k: v for k, v in fields.items() if k not in ("dtype", "transformers_version", "_name_or_path")}
    fields["tie_word_embeddings"] = _is_tied(source)
    fields["vocab_size"] = next(v.shape[0] for name, v in state.items() if name.endswith("embed_tokens.weight"))
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        fields["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return fields


def _llava_config(source: Exportable, vision_tower: str, feature_layer: int, state: State) -> dict[str, Any]:
    config = source.config
    text = _text_config(source, state)
    text.pop("rope_parameters", None)
    family = "llava_llama" if text.pop("model_type") == "llama" else "llava_mistral"
    architecture = "LlavaLlamaForCausalLM" if family == "llava_llama" else "LlavaMistralForCausalLM"
    return {
        **text,
        "architectures": [architecture],
        "model_type": family,
        "torch_dtype": _dtype_name(state),
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": config.image_aspect_ratio,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": config.projector["type"],
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch" if config.vision_feature_select == "full" else "patch",
        "mm_vision_select_layer": feature_layer,
        "mm_vision_tower": vision_tower or "vision_tower",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }


def _write_tower(source: Exportable, tower: WholeTower, folder: Path) -> None:
    """The tower as a folder of its own, with the statistics of its pictures."""
    folder.mkdir()
    config = {**tower.config, "architectures": ["CLIPVisionModel"]}
    write_json(folder / "config.json", config)
    write_state(folder, {f"vision_model.{name}": value for name, value in tower.state.items()})
    write_json(folder / "preprocessor_config.json", _image_processor(source, "CLIPImageProcessor"))


def _image_processor(source: Exportable, kind: str) -> dict[str, Any]:
    side = source.config.image_size
    square = {"height": side, "width": side}
    return {
        "image_processor_type": kind,
        "crop_size": square,
        "do_center_crop": kind == "CLIPImageProcessor" and source.config.image_aspect_ratio == "pad",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(source.config.image_mean),
        "image_std": list(source.config.image_std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": square if source.config.image_aspect_ratio == "resize" else {"shortest_edge": side},
    }


def _write_processor(source: Exportable, tower: WholeTower, folder: Path) -> None:
    padded = source.config.image_aspect_ratio == "pad"
    processor = source.processor
    processor.tokenizer.save_pretrained(folder)
    _for_version_4(folder / "tokenizer_config.json")
    about = {
        "processor_class": "LlavaProcessor",
        "image_token": processor.image_token,
        "num_additional_image_tokens": int(tower.config["model_type"] == "clip_vision_model"),
        "patch_size": tower.config["patch_size"],
        "vision_feature_select_strategy": select_strategy(source),
    }
    write_json(folder / "processor_config.json", about)
    pictures = _image_processor(source, "LlavaImageProcessor" if padded else "CLIPImageProcessor")
    pictures |= {"do_pad": True} if padded else {}
    write_json(folder / "preprocessor_config.json", {**pictures, "processor_class": "LlavaProcessor"})
    template = str(processor.chat_template)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(folder / "chat_template.json", {"chat_template": template})


def _for_version_4(path: Path) -> None:
    """Tokenizer settings in words that version 4 knows too."""
    fields = read_json(path)
    if fields.get("tokenizer_class") in _VERSION_5_ONLY:
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    fields.pop("backend", None)
    write_json(path, fields)


def _write_generation(source: Exportable, folder: Path) -> None:
    for name in ("generation_config.json",):
        fields = read_json(source.path / name)
        fields.pop("transformers_version", None)
        if fields:
            write_json(folder / name, fields)


def _dtype_name(state: State) -> str:
    return str(next(iter(state.values())).dtype).removeprefix("torch.")
