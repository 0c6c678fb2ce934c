"""Checkpoints of the original LLaVA and of transformers' LLaVA as checkpoints of ours."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from llava_scale.compressors import PROJECTORS
from llava_scale.config import ModelConfig
from llava_scale.config.model import ProjectorConfig
from llava_scale.data.chat import ChatEncoder
from llava_scale.data.templates import TEMPLATES
from llava_scale.errors import CheckpointError, ConfigError, suggest
from llava_scale.model.build import BuiltModel, add_placeholders, build_model, finish_model, grow_vocabulary
from llava_scale.model.configuration import LlavaScaleConfig
from llava_scale.model.interop_files import State, new_folder, read_json, read_state, read_tensors
from llava_scale.model.interop_names import Rename, from_llava, from_transformers, is_constant, projector_name
from llava_scale.model.interop_plan import Source, keep_source
from llava_scale.model.modeling import LlavaScaleForConditionalGeneration
from llava_scale.towers.hub import load_vision_model, read_image_stats, vision_config_of
from llava_scale.towers.vision import own_image_size

logger = logging.getLogger(__name__)

LLAVA, TRANSFORMERS, PROJECTOR = "llava", "transformers", "projector"

_TEXT_FAMILIES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
}
_PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors")
_VICUNA = ("USER:", "ASSISTANT:")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSettings:
    """What the source does not say of itself.

    Attributes:
        language_model: Language model of a projector that comes alone; its config's ``_name_or_path`` if empty.
        vision_tower: Vision tower, where the source holds none; its config's ``mm_vision_tower`` if empty.
        chat_template: ``plain``, ``vicuna_v1`` or ``native``; empty takes what the source was trained with.
        dtype: Type of the weights; empty keeps the source's.
    """

    language_model: str = ""
    vision_tower: str = ""
    chat_template: str = ""
    dtype: str = ""

    def __post_init__(self) -> None:
        if self.chat_template and self.chat_template not in TEMPLATES:
            raise ConfigError(f"unknown chat template {self.chat_template!r}; {suggest(self.chat_template, TEMPLATES)}")


@dataclass(slots=True, kw_only=True)
class _Found:
    """A source as it was read: our config, weights by our names, and what our model has no use for."""

    config: LlavaScaleConfig
    state: State
    unused: State = field(default_factory=dict)
    has_vision: bool = True


def import_checkpoint(source: Path, target: Path, settings: ImportSettings | None = None) -> str:
    """Write the checkpoint in ``source`` as one of ours into ``target``; return its layout.

    What only the old format has a place for (vision blocks above the features, its tokenizer files and config) is kept
    in ``imported/``, so that an export gives back the same tensors under the same names.

    Args:
        source: Folder of the original LLaVA's or of transformers' layout, or ``mm_projector.bin`` (or its folder).
        target: New folder.
        settings: What the source does not say.

    Raises:
        CheckpointError: nothing known lies there, or weights are missing or left over.
        ConfigError: the source has parts that are not supported.
    """
    options = settings or ImportSettings()
    layout = detect_layout(source)
    with new_folder(target) as partial:
        if layout == PROJECTOR:
            model, processor = _build_around_projector(source, options)
        else:
            found = _read_llava(source, options) if layout == LLAVA else _read_transformers(source)
            model, processor = _build(found, source, options)
            fields = read_json(source / "config.json")
            kept = Source(layout=layout, has_vision=found.has_vision, config=fields, unused=found.unused)
            keep_source(partial, source, kept)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    return layout


def detect_layout(source: Path) -> str:
    """``llava``, ``transformers`` or ``projector``.

    Raises:
        CheckpointError: nothing known lies there.
    """
    if source.is_file():
        return PROJECTOR
    fields = read_json(source / "config.json")
    if "mm_vision_tower" in fields and not _projector_file(source):
        return LLAVA
    if fields.get("model_type") == "llava" and "text_config" in fields:
        return TRANSFORMERS
    if _projector_file(source):
        return PROJECTOR
    kind = fields.get("model_type")
    what = f"a model of type {kind!r}" if kind else "no config.json"
    raise CheckpointError(
        f"{source} holds {what}; import takes folders of the original LLaVA (config with mm_vision_tower), of "
        "transformers' LlavaForConditionalGeneration, or mm_projector.bin"
    )


def _projector_file(folder: Path) -> Path | None:
    return next((folder / name for name in _PROJECTOR_FILES if (folder / name).is_file()), None)


def _read_transformers(source: Path) -> _Found:
    fields = read_json(source / "config.json")
    layer = fields.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ConfigError(f"{source}: vision_feature_layer {layer} joins several layers, which is not supported")
    if fields.get("projector_hidden_act", "gelu") != "gelu" or not fields.get("multimodal_projector_bias", True):
        raise ConfigError(f"{source}: only projectors with GELU and biases are supported")
    vision = _sub_config(fields.get("vision_config"), "clip_vision_model")
    mean, std = read_image_stats(str(source), vision)
    config = LlavaScaleConfig(
        vision_config=vision,
        text_config=_sub_config(fields.get("text_config"), "llama"),
        projector={"type": "mlp2x_gelu"},
        vision_feature_layer=layer,
        vision_feature_select="full" if _keeps_class_token(fields, vision) else "patch",
        image_size=own_image_size(vision),
        image_aspect_ratio=_aspect_of_processor(source),
        image_mean=mean,
        image_std=std,
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )
    return _split(config, read_state(source), from_transformers, source)


def _sub_config(fields: dict[str, Any] | None, default: str) -> PreTrainedConfig:
    values = dict(fields or {})
    return AutoConfig.for_model(values.pop("model_type", default), **values)


def _keeps_class_token(fields: dict[str, Any], vision: PreTrainedConfig) -> bool:
    """``full`` keeps a class token only where the tower has one."""
    strategy = fields.get("vision_feature_select_strategy", "default")
    return bool(strategy == "full" and vision.model_type == "clip_vision_model")


def _aspect_of_processor(source: Path) -> Any:
    fields = read_json(source / "preprocessor_config.json")
    fields = fields or read_json(source / "processor_config.json").get("image_processor", {})
    if fields.get("do_pad"):
        return "pad"
    if fields.get("do_center_crop"):
        logger.warning("%s cuts pictures to their middle; here they are padded to squares instead", source)
        return "pad"
    return "resize" if fields else "pad"


def _read_llava(source: Path, options: ImportSettings) -> _Found:
    fields = read_json(source / "config.json")
    _refuse_variants(fields, source)
    state = read_state(source)
    tower_name = _tower_name(fields, source, options)
    own_tower = [name for name in state if name.startswith("model.vision_tower.")]
    vision = vision_config_of(tower_name)
    mean, std = read_image_stats(tower_name, vision)
    family = _TEXT_FAMILIES[fields.get("model_type", "llava")]
    config = LlavaScaleConfig(
        vision_config=vision,
        text_config=_sub_config({**_text_fields(fields), "model_type": family}, family),
        projector={"type": _projector_type(fields, source)},
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        vision_feature_select="full" if fields.get("mm_vision_select_feature") == "cls_patch" else "patch",
        image_size=own_image_size(vision),
        image_aspect_ratio=_aspect_of_llava(fields, source),
        image_mean=mean,
        image_std=std,
    )
    if not own_tower:
        model = load_vision_model(tower_name, vision, torch.get_default_dtype())
        prefix = "model.vision_tower.vision_tower."
        state |= {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    found = _split(config, state, from_llava, source)
    if not own_tower:
        found.unused = {name: tensor for name, tensor in found.unused.items() if is_constant(name)}
    found.has_vision = bool(own_tower)
    return found


def _refuse_variants(fields: dict[str, Any], source: Path) -> None:
    kind = fields.get("model_type", "llava")
    if kind not in _TEXT_FAMILIES:
        raise ConfigError(f"{source}: model_type {kind!r} is not supported; known: {', '.join(sorted(_TEXT_FAMILIES))}")
    wrong = {
        "mm_use_im_start_end": (False, None),
        "mm_patch_merge_type": ("flat", None),
        "s2": (False, None),
    }
    for name, allowed in wrong.items():
        if fields.get(name) not in allowed:
            raise ConfigError(f"{source}: {name}={fields[name]!r} is not supported (LLaVA-1.5 has {allowed[0]!r})")


def _text_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of the language model; those of pictures and training are the original's own."""
    dropped = ("mm_", "tune_", "image_", "freeze_", "unfreeze_", "use_mm_", "tokenizer_", "pretrain_")
    others = ("architectures", "model_type", "_name_or_path", "transformers_version", "torch_dtype", "dtype")
    return {name: value for name, value in fields.items() if not name.startswith(dropped) and name not in others}


def _projector_type(fields: dict[str, Any], source: Path) -> str:
    kind = str(fields.get("mm_projector_type", "linear"))
    if kind not in PROJECTORS:
        raise ConfigError(f"{source}: mm_projector_type {kind!r} is not supported; {suggest(kind, PROJECTORS)}")
    return kind


def _aspect_of_llava(fields: dict[str, Any], source: Path) -> Any:
    aspect = fields.get("image_aspect_ratio") or "square"
    if aspect == "square":
        logger.warning("%s cuts pictures to their middle; here they are padded to squares instead", source)
    elif aspect not in ("pad", "resize"):
        raise ConfigError(f"{source}: image_aspect_ratio {aspect!r} is not supported; LLaVA-1.5 has 'pad'")
    return "resize" if aspect == "resize" else "pad"


def _tower_name(fields: dict[str, Any], source: Path, options: ImportSettings) -> str:
    """Where the tower's config (and weights, if the checkpoint has none) are: as given, or beside the checkpoint."""
    name = options.vision_tower or str(fields.get("mm_vision_tower") or "")
    if not name:
        raise ConfigError(f"{source} does not name its vision tower; give it with --vision-tower")
    beside = source / Path(name).name
    return str(beside) if not Path(name).exists() and (beside / "config.json").is_file() else name


def _split(config: LlavaScaleConfig, state: State, rename: Rename, source: Path) -> _Found:
    """Sort a source's tensors into ours and those that a cut tower has no use for."""
    with torch.device("meta"):
        model = LlavaScaleForConditionalGeneration(config)
    expected = set(model.state_dict())
    found = _Found(config=config, state={})
    strange = []
    for name, tensor in state.items():
        ours = rename(name)
        if is_constant(name) or (ours is not None and ours.startswith("vision_tower.") and ours not in expected):
            found.unused[name] = tensor
        elif ours is None or ours not in expected:
            strange.append(name)
        else:
            found.state[ours] = tensor
    if strange:
        raise CheckpointError(
            f"{source}: {len(strange)} weights have no place in the model, first {strange[0]!r}; the checkpoint "
            "belongs to another model or its config does not fit"
        )
    return found


def _build(found: _Found, source: Path, options: ImportSettings) -> BuiltModel:
    tokenizer = AutoTokenizer.from_pretrained(source)
    template = options.chat_template or _template_of(tokenizer, source)
    add_placeholders(tokenizer)
    dtype = getattr(torch, options.dtype) if options.dtype else next(iter(found.state.values())).dtype
    found.config.dtype = dtype
    model, report = LlavaScaleForConditionalGeneration.from_pretrained(
        None, config=found.config, state_dict=found.state, dtype=dtype, output_loading_info=True
    )
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise CheckpointError(f"{source}: {len(missing)} weights are missing or of another shape, first {missing[0]!r}")
    _make_room(model, tokenizer)
    return finish_model(model.eval(), tokenizer, None, template)


def _make_room(model: LlavaScaleForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
    """Embeddings for the placeholders, and their ids in the config."""
    grow_vocabulary(model.language_model, len(tokenizer))
    model.config.text_config.vocab_size = model.language_model.get_input_embeddings().weight.shape[0]
    for kind in ("image", "video", "audio"):
        setattr(model.config, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<{kind}>"))


def _template_of(tokenizer: PreTrainedTokenizerBase, source: Path) -> str:
    """The chat template that the source was trained with, as far as it shows.

    Raises:
        ConfigError: it cannot be told.
    """
    native = tokenizer.chat_template
    if not isinstance(native, str) or all(word in native for word in _VICUNA):
        return "vicuna_v1"
    probe = AutoTokenizer.from_pretrained(source)
    add_placeholders(probe)
    try:
        ChatEncoder(probe, "native")
    except ConfigError as error:
        raise ConfigError(
            f"{source}: its chat template cannot be used ({error}); choose one with --chat-template"
        ) from None
    return "native"


def _build_around_projector(source: Path, options: ImportSettings) -> BuiltModel:
    """Named tower and language model with the projector of ``source`` between them."""
    path = source if source.is_file() else _projector_file(source)
    assert path is not None
    state = {projector_name(name): tensor for name, tensor in read_tensors(path).items()}
    state.pop(None, None)
    fields = read_json(path.parent / "config.json")
    language_model = options.language_model or str(fields.get("_name_or_path") or "")
    vision_tower = options.vision_tower or str(fields.get("mm_vision_tower") or "")
    if not (language_model and vision_tower):
        raise ConfigError(
            f"{path} is a projector alone: name the models on both sides with --language-model and --vision-tower"
        )
    depth = sum(name is not None and name.endswith(".weight") for name in state)
    if not depth:
        raise CheckpointError(f"{path} holds no weights of an mm_projector")
    full = fields.get("mm_vision_select_feature") == "cls_patch"
    config = ModelConfig(
        language_model=language_model,
        vision_tower=vision_tower,
        vision_feature_layer=int(fields.get("mm_vision_select_layer", -2)),
        vision_feature_select="full" if full else "patch",
        image_aspect_ratio=_aspect_of_llava({"image_aspect_ratio": "pad", **fields}, path),
        projector=ProjectorConfig(type="linear" if depth == 1 else f"mlp{depth}x_gelu"),
        torch_dtype=options.dtype or "float32",  # type: ignore[arg-type]
    )
    model, processor = build_model(config, chat_template=options.chat_template or "plain", seed=0)
    try:
        model.projector.load_state_dict({str(name).removeprefix("projector."): value for name, value in state.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit between {vision_tower} and {language_model}: {error}") from None
    return model, processor
