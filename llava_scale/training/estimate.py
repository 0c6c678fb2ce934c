"""What a run will take, before anything is bought: parameters, memory of each process, operations, hours.

The model is put together without memory. Activations are not guessed: one row runs through the language model on
tensors without contents, and what autograd would hold for the backward pass is added up.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_scale.errors import ConfigError
from llava_scale.training.cost import Work, known_peak, model_cost
from llava_scale.training.engine import blocks_of
from llava_scale.training.muon import takes_muon
from llava_scale.training.recipe import ModuleSummary, apply_recipe, plan_recipe

if TYPE_CHECKING:
    from llava_scale.config import Config, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the run would get.

    Attributes:
        num_devices: Processes, one a device.
        peak_tflops: Matrix throughput of one device in 10^12 operations a second.
        mfu: Share of it that is reached.
    """

    num_devices: int
    peak_tflops: float
    mfu: float


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """An average sample.

    Attributes:
        pictures: Pictures in it.
        text_tokens: Tokens that are not media.
        answer_share: Share of these in the loss.
    """

    pictures: float
    text_tokens: float
    answer_share: float


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory of one process in bytes.

    Attributes:
        weights: Parameters that it holds, whole or in shards.
        gathered: Copies of sharded parameters while they are used.
        gradients: Of the trained ones.
        optimizer: Its moments: two a parameter, one where Muon updates it.
        activations: Held for the backward pass of one row, casts of weights included.
        working: Gradients of one block's activations, and where these are computed again, the activations themselves.
        logits: Of the supervised positions, and their gradient.
    """

    weights: float
    gathered: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    logits: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take.

    Attributes:
        modules: Parameters, and what is trained.
        visual_tokens: Tokens of a picture in the text.
        tokens_per_sample: Text and media.
        samples_per_step: Over all processes.
        num_steps: Optimizer steps.
        memory: Of one process.
        flops_per_step: Matrix operations over all processes.
        hours: Of the whole run on the given hardware; None without a known peak.
    """

    modules: tuple[ModuleSummary, ...]
    visual_tokens: int
    tokens_per_sample: float
    samples_per_step: float
    num_steps: int
    memory: RankMemory
    flops_per_step: float
    hours: float | None


def estimate(
    config: Config, *, hardware: Hardware, sample: SampleShape, num_samples: int = 0, half: bool = True
) -> Estimate:
    """Estimate a run.

    Args:
        config: All settings; no data is opened.
        hardware: What it would run on.
        sample: What its samples are like.
        num_samples: Samples of one epoch; needed where ``train.steps`` is 0.
        half: Whether matrix work is done in bfloat16, where ``train.precision`` leaves it open.

    Raises:
        ConfigError: the settings contradict, or the length of the run is not known.
    """
    train, packing = config.train, config.data.packing
    if train.rows_per_step % hardware.num_devices:
        raise ConfigError(
            f"train.rows_per_step={train.rows_per_step} cannot be divided among {hardware.num_devices} devices; "
            f"make it a multiple of {hardware.num_devices}"
        )
    model = model_without_memory(config.model)
    recipe = plan_recipe(model, replace(train, lora=type(train.lora)()))
    apply_recipe(model, recipe)
    visual = visual_tokens(model)
    length = sample.text_tokens + sample.pictures * visual
    per_row = packing.row_length / length if packing.mode == "tokens" else packing.samples_per_row
    row_tokens = packing.row_length if packing.mode == "tokens" else math.ceil(per_row * length)
    supervised = round(per_row * sample.text_tokens * sample.answer_share)
    samples_per_step = per_row * train.rows_per_step
    work = Work(
        tokens=samples_per_step * length,
        squares=samples_per_step * length**2,
        supervised=supervised * train.rows_per_step,
        visual=samples_per_step * sample.pictures * visual,
        pictures=0.0 if config.data.features else samples_per_step * sample.pictures,
    )
    flops = model_cost(model).flops(work)
    num_steps = train.steps or math.ceil(train.epochs * num_samples / samples_per_step)
    if not num_steps:
        raise ConfigError("the length of the run is not known: set train.steps, or give the number of samples")
    rate = hardware.num_devices * hardware.peak_tflops * hardware.mfu * 1e12
    half = half if train.precision == "auto" else train.precision == "bf16"
    return Estimate(
        modules=recipe.modules,
        visual_tokens=visual,
        tokens_per_sample=length,
        samples_per_step=samples_per_step,
        num_steps=num_steps,
        memory=rank_memory(
            model, config, num_ranks=hardware.num_devices, row_tokens=row_tokens, supervised=supervised, half=half
        ),
        flops_per_step=flops,
        hours=flops * num_steps / rate / 3600 if rate else None,
    )


def device_peak(name: str) -> float:
    """Peak of a device by name.

    Raises:
        ConfigError: it is not known.
    """
    peak = known_peak(name)
    if not peak:
        raise ConfigError(f"the peak of {name!r} is not known; give it in 10^12 operations a second with --tflops")
    return peak


def visual_tokens(model: Any) -> int:
    """Tokens of a picture in the text, once schedules have ended."""
    return int(model.num_visual_tokens() if hasattr(model, "num_visual_tokens") else model.vision_tower.num_tokens)


def model_without_memory(config: ModelConfig) -> Any:
    """The model that ``build_model`` would build, as shapes and types only; nothing but configs is read.

    Raises:
        ConfigError: parts that do not exist or do not fit together.
    """
    from transformers import AutoConfig

    from llava_scale.config import to_dict
    from llava_scale.model import LlavaScaleConfig, LlavaScaleForConditionalGeneration
    from llava_scale.model.presets import tiny_text_config, tiny_tokenizer, tiny_vision_config
    from llava_scale.towers.hub import vision_config_of
    from llava_scale.towers.vision import own_image_size

    if config.init_from:
        full = LlavaScaleConfig.from_pretrained(config.init_from)
    else:
        if ":" in config.vision_tower:
            raise ConfigError("a vision tower by import path has no config to estimate from; name a similar one")
        if config.preset:
            text, vision = tiny_text_config(len(tiny_tokenizer()) + 3), tiny_vision_config()
        else:
            text, vision = AutoConfig.from_pretrained(config.language_model), vision_config_of(config.vision_tower)
        options: dict[str, Any] = {
            "text_config": text,
            "vision_config": vision,
            "projector": {"type": config.projector.type, "input_norm": config.projector.input_norm},
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select": config.vision_feature_select,
            "image_size": config.image_size or own_image_size(vision),
        }
        if "compressor" in inspect.signature(LlavaScaleConfig.__init__).parameters:
            options |= _compression(config, to_dict)
        full = LlavaScaleConfig(**options)
    with torch.device("meta"):
        return LlavaScaleForConditionalGeneration(full).to(getattr(torch, config.torch_dtype))


def _compression(config: ModelConfig, to_dict: Any) -> dict[str, Any]:
    compressor = config.compressor
    reader = getattr(compressor, "instruction_tower", "")
    options: dict[str, Any] = {"compressor": None if compressor is None else to_dict(compressor)}
    if reader:
        from llava_scale.towers.instruction import instruction_config_of

        options["instruction_config"] = instruction_config_of(reader)
    return options


def rank_memory(
    model: Any, config: Config, *, num_ranks: int, row_tokens: int, supervised: int, half: bool
) -> RankMemory:
    """Memory of one process that trains ``model``, whose trained parameters are chosen."""
    parallel = config.train.parallel
    shards = num_ranks // parallel.replicas if parallel.strategy == "fsdp2" and num_ranks > 1 else 1
    sharded = {
        name
        for name, value in model.named_parameters()
        if shards > 1 and (value.requires_grad or (parallel.shard_frozen and name.startswith("language_model.")))
    }
    weights = gradients = moments = 0.0
    for name, value in model.named_parameters():
        size = value.numel() * value.element_size()
        weights += size / (shards if name in sharded else 1)
        if value.requires_grad:
            whole_gradients = config.train.rows_per_step > num_ranks and not parallel.reduce_every_row
            gradients += size / (1 if whole_gradients else shards)
            one = config.train.optimizer == "muon" and takes_muon(name, value)
            moments += (1 if one else 2) * size / shards
    held, working, logits = held_bytes(model, config, row_tokens=row_tokens, supervised=supervised, half=half)
    return RankMemory(
        weights=weights,
        gathered=_gathered(model, sharded, parallel.param_dtype == "bfloat16" and half) if shards > 1 else 0.0,
        gradients=gradients * (2 if num_ranks > 1 and shards == 1 else 1),  # DDP's buckets
        optimizer=moments,
        activations=held,
        working=working,
        logits=logits,
    )


def _gathered(model: nn.Module, sharded: set[str], half: bool) -> float:
    """The outermost unit, and two blocks: one in use, one on its way."""
    width = {name: value.numel() * (2 if half else value.element_size()) for name, value in model.named_parameters()}
    blocks = blocks_of(model.get_submodule("language_model"))
    inside = {id(value) for block in blocks for value in block.parameters()}
    names = {name: value for name, value in model.named_parameters() if name in sharded}
    root = sum(width[name] for name, value in names.items() if id(value) not in inside)
    stack = sum(width[name] for name, value in names.items() if id(value) in inside)
    return float(root + 2 * stack / max(len(blocks), 1))


def held_bytes(
    model: Any, config: Config, *, row_tokens: int, supervised: int, half: bool
) -> tuple[float, float, float]:
    """Bytes that the backward pass of one row needs: held in the language model, while a block is worked on, logits."""
    recompute = config.train.gradient_checkpointing
    with FakeTensorMode(allow_non_fake_inputs=True):
        language = _with_fake_weights(model.language_model)
        layers = len(blocks_of(language))
        embeds = torch.empty(1, row_tokens, model.config.text_config.hidden_size, requires_grad=True)
        counter = _HeldBytes(language)
        positions = torch.arange(row_tokens).unsqueeze(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half), counter:
            hidden = language.base_model(
                inputs_embeds=embeds, position_ids=positions, attention_mask=None, use_cache=False
            ).last_hidden_state
        inside = float(counter.total)
    working = block = inside / max(layers, 1)
    if recompute:
        inside, working = layers * row_tokens * embeds.shape[-1] * float(hidden.element_size()), 2 * block
    vocabulary = model.config.text_config.vocab_size
    at_once = min(config.train.loss_chunk, supervised)
    # Scores in the type of the matrix work, in float32, their log-softmax, and the gradient of both.
    logits = at_once * vocabulary * (2 + 4 + 4 + 4 + 2 if half else 4 + 4 + 4)
    return inside, working, float(logits)


class _HeldBytes(torch.autograd.graph.saved_tensors_hooks):
    """Adds up what autograd holds, each storage once and the parameters not."""

    def __init__(self, module: nn.Module) -> None:
        self._seen = {value.untyped_storage()._cdata for value in module.parameters()}
        self.total = 0
        self._kept: list[torch.Tensor] = []
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)  # so that no other storage takes its place
            self.total += storage.nbytes()
        return tensor


def _with_fake_weights(module: nn.Module) -> Any:
    """``module`` with parameters that have a place on the CPU but no contents; called inside the mode that makes them.

    In place: the model is without memory anyway.
    """
    known: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                if id(value) not in known:
                    empty = torch.empty(value.shape, dtype=value.dtype)
                    known[id(value)] = nn.Parameter(empty, requires_grad=value.requires_grad)
                part._parameters[name] = known[id(value)]
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return module.train()
