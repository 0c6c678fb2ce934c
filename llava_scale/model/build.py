"""From a config to a model with its processor, and from a checkpoint back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llava_scale.config import ModelConfig, to_dict
from llava_scale.config.compressor import CLIP_TEXT
from llava_scale.config.model import VideoConfig
from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.model.attention import PACKED
from llava_scale.model.build_audio import audio_tower_of, give_hearing, match_audio_scale, parts_with_weights
from llava_scale.model.configuration import OPENAI_MEAN, OPENAI_STD, CustomVisionConfig, LlavaScaleConfig
from llava_scale.model.exchange import exchange_compressor
from llava_scale.model.head import check_head
from llava_scale.model.modeling import LlavaScaleForConditionalGeneration, build_tower
from llava_scale.model.presets import (
    TINY_IMAGE_MEAN,
    TINY_IMAGE_STD,
    spread_positions,
    tiny_instruction_config,
    tiny_text_config,
    tiny_tokenizer,
    tiny_vision_config,
)
from llava_scale.model.processing import LlavaScaleProcessor
from llava_scale.towers import TransformersVisionTower, VisionTower, import_encoder
from llava_scale.towers.hub import (
    check_cut,
    load_vision_model,
    read_image_stats,
    vision_config_of,
    whole_features,
)
from llava_scale.towers.instruction import (
    InstructionTower,
    instruction_config_of,
    instruction_tokenizer_of,
    load_instruction_model,
)
from llava_scale.towers.vision import own_image_size
from llava_scale.types import PLACEHOLDERS

logger = logging.getLogger(__name__)

BuiltModel = tuple[LlavaScaleForConditionalGeneration, LlavaScaleProcessor]

VOCABULARY_MULTIPLE = 64
"""Embeddings grow to a multiple of this, which matrix units like."""

CALIBRATION_PICTURES = 4
"""Random pictures on which the projector's first outputs are measured."""

_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


_HEARING = ("audio_tower", "audio_window_seconds", "audio_projector", "audio_compressor")


def build_model(config: ModelConfig, *, chat_template: str, seed: int) -> BuiltModel:
    """Put a model together and give it a processor for ``chat_template``.

    Weights come from ``init_from``, or from the named tower and language model with a fresh projector, or all fresh
    under ``preset``. Fresh weights depend on ``seed`` alone; the global random state is left as it was.

    Raises:
        ConfigError: parts that do not exist or do not fit together.
        CheckpointError: ``init_from`` or a named part is not complete.
    """
    dtype: torch.dtype = getattr(torch, config.torch_dtype)
    if config.init_from:
        return _continue_from(config, dtype, chat_template, seed=seed)
    if not config.preset and not (config.language_model and config.vision_tower):
        raise ConfigError("model needs both language_model and vision_tower, or preset, or init_from")
    if config.vision_tower_kwargs and ":" not in config.vision_tower:
        raise ConfigError("model.vision_tower_kwargs is for a tower by import path (package.module:Class) only")
    with _seeded(seed):
        tokenizer = tiny_tokenizer() if config.preset else _named_tokenizer(config.language_model)
        add_placeholders(tokenizer)
        language_model = _language_model(config, tokenizer, dtype)
        full, tower = _config_and_tower(config, language_model.config, dtype)
        reader, question_tokenizer = _instruction_tower(config, full, dtype)
        ears = audio_tower_of(config, full, dtype)
        for kind, placeholder in PLACEHOLDERS.items():
            setattr(full, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(placeholder))
        _keep_weights(*parts_with_weights(tower, language_model, reader, ears))
        model = LlavaScaleForConditionalGeneration(
            full, vision_tower=tower, language_model=language_model, instruction_tower=reader, audio_tower=ears
        ).to(dtype)
        _match_scales(model, config, seed=seed)
    return finish_model(model.eval(), tokenizer, question_tokenizer, chat_template)


def build_processor(config: ModelConfig, *, chat_template: str) -> LlavaScaleProcessor:
    """The processor that ``build_model`` would give, without loading a language model.

    Raises:
        ConfigError, CheckpointError: as ``build_model``.
    """
    if config.init_from:
        return load_processor(config.init_from, chat_template=chat_template)
    if config.preset:
        return build_model(config, chat_template=chat_template, seed=0)[1]
    if not (config.language_model and config.vision_tower):
        raise ConfigError("model needs both language_model and vision_tower, or preset, or init_from")
    tokenizer = _named_tokenizer(config.language_model)
    add_placeholders(tokenizer)
    with _seeded(0):
        full, tower = _config_and_tower(config, tiny_text_config(len(tokenizer)), getattr(torch, config.torch_dtype))
        audio_tower_of(config, full, getattr(torch, config.torch_dtype))
    full.chat_template_name = chat_template
    question_tokenizer = None
    reader = _reader_name(config)
    if reader:
        full.instruction_config = instruction_config_of(reader)
        question_tokenizer = instruction_tokenizer_of(reader)
    return LlavaScaleProcessor.for_tower(full, tower, tokenizer, question_tokenizer)


def load_processor(path: str | Path, *, chat_template: str = "") -> LlavaScaleProcessor:
    """Processor of a checkpoint without its weights; with ``chat_template`` for another template than its own.

    Raises:
        CheckpointError: no checkpoint of ours there.
    """
    try:
        processor = LlavaScaleProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    assert isinstance(processor, LlavaScaleProcessor)
    return processor.with_template(chat_template) if chat_template else processor


def load_model(path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> BuiltModel:
    """Load a checkpoint of ours with its processor; ``dtype`` None keeps the type it was saved in.

    Raises:
        CheckpointError: no checkpoint there, or any weight missing, left over, or of another shape.
    """
    try:
        model, report = LlavaScaleForConditionalGeneration.from_pretrained(
            path, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
        processor = LlavaScaleProcessor.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in report[problem])
        if keys:
            raise CheckpointError(
                f"{path}: {len(keys)} {problem.replace('_', ' ')}, first {keys[0]!r}; the checkpoint is torn or "
                "belongs to another model"
            )
    if processor.reads_questions:
        model.question_encoder = processor.encode_questions
    return model.to(device).eval(), processor


def add_placeholders(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give ``tokenizer`` one special token for each placeholder, and a padding token if it has none.

    A missing padding token becomes a token of its own, so that the end-of-text token keeps its one meaning.
    """
    placeholders = [AddedToken(mark, special=True, normalized=False) for mark in PLACEHOLDERS.values()]
    tokenizer.add_tokens(placeholders, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})


@torch.no_grad()
def grow_vocabulary(language_model: PreTrainedModel, num_tokens: int) -> None:
    """Make room for ``num_tokens`` token ids; new rows start at the mean of the old ones, so none stands out."""
    old = language_model.get_input_embeddings().weight.shape[0]
    if num_tokens <= old:
        return
    language_model.resize_token_embeddings(num_tokens, pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False)
    for layer in {language_model.get_input_embeddings(), language_model.get_output_embeddings()}:
        layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)
        if getattr(layer, "bias", None) is not None:
            layer.bias[old:] = layer.bias[:old].mean()


@torch.no_grad()
def match_embedding_scale(model: LlavaScaleForConditionalGeneration, *, seed: int) -> None:
    """Scale the projector so that picture tokens start at the root mean square of the text embeddings.

    Measured on a few random pictures, whose smooth patches look more like photographs to a tower than noise does.

    Raises:
        ConfigError: the projector has no layer to scale.
    """
    side = model.config.image_size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(CALIBRATION_PICTURES, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    pictures = (smooth * 255).to(torch.uint8).to(model.device)
    token_ids = torch.arange(model.config.text_config.vocab_size, device=model.device)
    wanted = _rms(model.get_input_embeddings()(token_ids))
    model.projector.scale_output(float(wanted / _rms(model.get_image_features(pictures))))


def _match_scales(model: LlavaScaleForConditionalGeneration, config: ModelConfig, *, seed: int) -> None:
    if config.projector.match_embedding_scale and not config.init_from:
        match_embedding_scale(model, seed=seed)
    if config.audio_tower and config.audio_projector.match_embedding_scale:
        match_audio_scale(model, seed=seed)


def _rms(values: Tensor) -> Tensor:
    return values.float().pow(2).mean().sqrt()


def _continue_from(config: ModelConfig, dtype: torch.dtype, chat_template: str, *, seed: int) -> BuiltModel:
    names = ("init_from", "torch_dtype", "compressor", "video", *_HEARING)
    if config != ModelConfig(**{name: getattr(config, name) for name in names}):
        raise ConfigError(
            "model.init_from takes towers and language model from the checkpoint; beside it only torch_dtype, "
            "compressor, video and, if that checkpoint does not hear yet, the audio_ fields may be set"
        )
    model, processor = load_model(config.init_from, dtype=dtype)
    if config.compressor is not None:
        exchange_compressor(model, config.compressor)
    if config.video != VideoConfig():
        model.config.video = to_dict(config.video)
    if config.audio_tower:
        with _seeded(seed):
            give_hearing(model, config, dtype)
            _match_scales(model, config, seed=seed)
    model.config.chat_template_name = chat_template
    return finish_model(model, processor.tokenizer, processor.question_tokenizer, chat_template)


def finish_model(
    model: LlavaScaleForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    question_tokenizer: PreTrainedTokenizerBase | None,
    chat_template: str,
) -> BuiltModel:
    """Add the processor, and tell ``generate`` when to stop."""
    model.config.chat_template_name = chat_template
    processor = LlavaScaleProcessor.for_model(model, tokenizer, question_tokenizer)
    if processor.reads_questions:
        model.question_encoder = processor.encode_questions
    generation = model.generation_config
    generation.eos_token_id = sorted(processor.chat_encoder.eos_ids)
    generation.pad_token_id = tokenizer.pad_token_id
    generation.suppress_tokens = [getattr(model.config, f"{kind}_token_id") for kind in PLACEHOLDERS]
    return model, processor


def _named_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of model.language_model {name!r} cannot be loaded: {error}") from error


def _language_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """Language model with room for the tokenizer, checked for what we need of it."""
    if config.preset:
        text_config = tiny_text_config(len(tokenizer))
        text_config._attn_implementation = PACKED
        language_model = AutoModelForCausalLM.from_config(text_config).to(dtype)
    else:
        try:
            language_model = AutoModelForCausalLM.from_pretrained(
                config.language_model, dtype=dtype, attn_implementation=PACKED
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.language_model {config.language_model!r} cannot be loaded: {error}") from error
    _check_layers(language_model)
    check_head(language_model)
    grow_vocabulary(language_model, len(tokenizer))
    return language_model


def _check_layers(language_model: PreTrainedModel) -> None:
    """Refuse language models that would mix packed samples or that sdpa computes wrongly."""
    text_config, name = language_model.config, type(language_model).__name__
    foreign = set(getattr(text_config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if foreign:
        raise ConfigError(f"{name} has {', '.join(sorted(foreign))} layers, which cannot keep packed samples apart")
    if not language_model._supports_sdpa or getattr(text_config, "attn_logit_softcapping", None):
        raise ConfigError(f"{name} needs an attention (soft-capped scores, sinks) that sdpa does not compute")


def _config_and_tower(
    config: ModelConfig, text_config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[LlavaScaleConfig, VisionTower]:
    """Config of the whole, and its vision tower with weights."""
    vision: dict[str, Any] = {"image_mean": OPENAI_MEAN, "image_std": OPENAI_STD, "image_size": config.image_size}
    pretrained = None
    if ":" in config.vision_tower:
        _warn_of_unused(config)
        custom = CustomVisionConfig(import_path=config.vision_tower, arguments=config.vision_tower_kwargs)
        encoder = import_encoder(custom.import_path, custom.arguments)
        vision |= {"vision_config": custom, "image_mean": encoder.image_mean, "image_std": encoder.image_std}
        vision["image_size"] = config.image_size or encoder.image_size
    elif config.preset:
        vision |= {"vision_config": tiny_vision_config(), "image_mean": TINY_IMAGE_MEAN, "image_std": TINY_IMAGE_STD}
    else:
        vision["vision_config"] = vision_config_of(config.vision_tower)
        stats = read_image_stats(config.vision_tower, vision["vision_config"])
        vision["image_mean"], vision["image_std"] = stats
        pretrained = load_vision_model(config.vision_tower, vision["vision_config"], dtype)
    vision["image_size"] = vision["image_size"] or own_image_size(vision["vision_config"])
    full = LlavaScaleConfig(
        text_config=text_config,
        projector={"type": config.projector.type, "input_norm": config.projector.input_norm},
        compressor=None if config.compressor is None else to_dict(config.compressor),
        video=to_dict(config.video),
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select=config.vision_feature_select,
        image_aspect_ratio=config.image_aspect_ratio,
        dtype=dtype,
        **vision,
    )
    expected = pretrained and whole_features(pretrained, full.vision_feature_layer, full.image_size)
    tower = build_tower(full, pretrained)
    if full.vision_config.model_type == "clip_vision_model" and config.preset:
        spread_positions(tower)
    tower = tower.to(dtype)
    if isinstance(tower, TransformersVisionTower):
        check_cut(tower, expected)
    return full, tower


def _reader_name(config: ModelConfig) -> str:
    """Name of the text encoder that reads questions; empty where none are read."""
    return str(getattr(config.compressor, "instruction_tower", ""))


def _instruction_tower(
    config: ModelConfig, full: LlavaScaleConfig, dtype: torch.dtype
) -> tuple[InstructionTower | None, PreTrainedTokenizerBase | None]:
    """Reader of questions and its tokenizer, where the compressor asks for them; its config goes into ``full``."""
    name = _reader_name(config)
    if not name:
        return None, None
    if config.preset and name == CLIP_TEXT:
        tokenizer, pretrained = tiny_tokenizer(), None
        full.instruction_config = tiny_instruction_config(len(tokenizer))
    else:
        tokenizer, full.instruction_config = instruction_tokenizer_of(name), instruction_config_of(name)
        pretrained = load_instruction_model(name, full.instruction_config, dtype)
    return InstructionTower(full.instruction_config, model=pretrained).to(dtype), tokenizer


def _warn_of_unused(config: ModelConfig) -> None:
    """A tower by import path decides itself which features it returns."""
    defaults = ModelConfig()
    for name in ("vision_feature_layer", "vision_feature_select"):
        if getattr(config, name) != getattr(defaults, name):
            logger.warning("model.%s has no effect on a vision tower given by import path", name)


def _keep_weights(*modules: nn.Module) -> None:
    """Mark weights as drawn or loaded, so that transformers does not draw them again around them."""
    for module in modules:
        for part in module.modules():
            part._is_hf_initialized = True  # type: ignore[assignment]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, and leave the global generator of the CPU as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
