"""From a config to a run that is ready for its first step."""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.training.checkpoint import find_checkpoint, frozen_fingerprint, load_state, set_aside
from llava_scale.training.engine import Engine, make_engine
from llava_scale.training.lora import add_adapters
from llava_scale.training.optim import build_optimizer
from llava_scale.training.parallel import Ranks
from llava_scale.training.precompute import check_frozen, open_features
from llava_scale.training.randomness import seed_everything, seed_rank, set_random_states
from llava_scale.training.recipe import Recipe, apply_recipe, plan_recipe, set_training_modes
from llava_scale.training.run_folder import RunFolder, check_same_run
from llava_scale.training.summary import RunSummary, summarize
from llava_scale.training.tensor_files import restore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from llava_scale.config import Config
    from llava_scale.data.features import FeatureFolder
    from llava_scale.training.checkpoint import TrainerState
    from llava_scale.types import StepBatch

logger = logging.getLogger(__name__)


class BatchStream(Protocol):
    """What training needs of a data stream."""

    @property
    def num_samples(self) -> int:
        """Samples in one pass."""
        ...

    def __iter__(self) -> Iterator[StepBatch]: ...

    def steps_per_epoch(self) -> float:
        """Optimizer steps in one pass over the samples."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that was handed out."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        ...

    def close(self) -> None:
        """Stop workers."""
        ...


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is put together from.

    Attributes:
        model: Whole, on the CPU.
        processor: Saved beside the model at the end.
        stream: Training batches, without end.
        open_eval: Opens the held-out batches from their start; None if there are none.
        features: Tower features that the batches hold instead of media; None if there are none.
    """

    model: nn.Module
    processor: Any
    stream: BatchStream
    open_eval: Callable[[], BatchStream] | None
    features: FeatureFolder | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run before its first step.

    Attributes:
        config: All settings.
        folder: Run folder.
        device: Where it trains.
        precision: ``bf16`` or ``fp32``, chosen for the device where the config leaves it open.
        ranks: This process among those of the run.
        parts: Model and data.
        engine: The model as these ranks train it.
        recipe: What is trained.
        optimizer: Over the recipe's parameters.
        frozen: Fingerprint of the others.
        total_steps: Steps of the whole run.
        state: Where a resumed run goes on; None at the start.
        checkpoint: Where ``state`` came from.
    """

    config: Config
    folder: RunFolder
    device: torch.device
    precision: str
    ranks: Ranks
    parts: Parts
    engine: Engine
    recipe: Recipe
    optimizer: torch.optim.AdamW
    frozen: str
    total_steps: int
    state: TrainerState | None
    checkpoint: Path | None

    @property
    def start_step(self) -> int:
        """Steps that lie behind."""
        return self.state.step if self.state is not None else 0

    def summary(self) -> RunSummary:
        """Opening summary."""
        return summarize(
            self.config,
            model=self.parts.model,
            recipe=self.recipe,
            device=_device_name(self.device),
            precision=self.precision,
            num_samples=self.parts.stream.num_samples,
            start_step=self.start_step,
            total_steps=self.total_steps,
            steps_per_epoch=self.parts.stream.steps_per_epoch(),
            output_dir=self.folder.path,
            num_ranks=self.ranks.size,
        )


def build_parts(config: Config, device: torch.device, ranks: Ranks, skipped_log: Path | None) -> Parts:
    """Build the model from its config and open its data.

    Raises:
        ConfigError, ShardError, CheckpointError: as their parts say.
    """
    from llava_scale.data.loader import open_stream
    from llava_scale.model import build_model

    if not config.data.sources:
        raise ConfigError("data.sources is empty: name at least one folder of shards, data.sources=[{path: SHARDS}]")
    model, processor = build_model(config.model, chat_template=config.data.chat_template, seed=config.seed)
    processor.set_limits(config.data)
    features = open_features(config, model, processor, choose_precision(config, device), ranks)
    shared: dict[str, Any] = {
        "seed": config.seed,
        "encoder": processor.chat_encoder,
        "counter": processor.token_counter,
        "image_transform": processor.image_transform,
        "transforms": processor.media_transforms,
        "pin_memory": device.type == "cuda",
        "features": features,
    }
    stream = open_stream(
        config.data,
        rows_per_step=config.train.rows_per_step,
        rank=ranks.rank,
        world_size=ranks.size,
        skipped_log=skipped_log,
        **shared,
    )
    among: dict[str, Any] = {"rows_per_step": ranks.size, "rank": ranks.rank, "world_size": ranks.size}
    has_eval = bool(config.data.eval_sources or config.data.holdout)
    return Parts(
        model=model,
        processor=processor,
        stream=stream,
        open_eval=(lambda: open_stream(config.data, split="eval", **among, **shared)) if has_eval else None,
        features=features,
    )


def prepare_run(
    config: Config,
    *,
    resume: bool,
    write: bool,
    cleanup: ExitStack,
    ranks: Ranks | None = None,
    build: Callable[[Config, torch.device, Ranks, Path | None], Parts] = build_parts,
) -> Run:
    """Check everything, build everything, and load the newest checkpoint of a resumed run.

    Args:
        config: All settings.
        resume: Continue from the newest whole checkpoint, or from step 0 if there is none yet.
        write: Make the run folder; False leaves the disk as it is.
        cleanup: Takes what must be closed at the end.
        ranks: All processes of the run; each must call this. Alone if None.
        build: Makes model and data.

    Raises:
        ConfigError: settings contradict, or differ from those of the run that is resumed.
        CheckpointError: there are checkpoints, but none that fits.
    """
    ranks = ranks or Ranks()
    folder = RunFolder(Path(config.train.output_dir))
    ranks.from_first(lambda: folder.check_startable(resume=resume))
    checkpoint = _newest_checkpoint(folder, ranks, rename_damaged=write) if resume else None
    state = load_state(checkpoint) if checkpoint else None
    if state is not None and checkpoint is not None:
        check_same_run(state.config, config, checkpoint)
    device = choose_device(config, ranks)
    seed_everything(config.seed)
    parts = build(config, device, ranks, folder.skipped if write else None)
    cleanup.callback(parts.stream.close)
    _add_adapters(parts.model, config, device, ranks)
    recipe = plan_recipe(parts.model, config.train)
    check_frozen(parts.features, recipe)
    _prepare_model(parts.model, recipe, config)
    precision = choose_precision(config, device)
    sharded = ranks.size > 1 and config.train.parallel.strategy == "fsdp2"
    frozen = frozen_fingerprint(parts.model if sharded else parts.model.to(device), ranks)
    engine = make_engine(
        parts.model,
        ranks,
        device,
        config.train.parallel,
        half=precision == "bf16",
        compiled=config.train.compile,
    )
    run = Run(
        config=config,
        folder=folder,
        device=device,
        precision=precision,
        ranks=ranks,
        parts=parts,
        engine=engine,
        recipe=recipe,
        optimizer=build_optimizer(parts.model, recipe, config.train),
        frozen=frozen,
        total_steps=state.total_steps if state else ranks.from_first(lambda: _total_steps(config, parts.stream)),
        state=state,
        checkpoint=checkpoint,
    )
    if write:
        ranks.from_first(lambda: _open_folder(folder, config, run.start_step))
    _restore(run)
    return run


def _add_adapters(model: nn.Module, config: Config, device: torch.device, ranks: Ranks) -> None:
    lora = config.train.lora
    if not lora.rank:
        unused = [name for name in ("dora", "quantize", "targets") if getattr(lora, name)]
        if unused:
            raise ConfigError(f"train.lora.{unused[0]} needs adapters: set train.lora.rank, for example to 16")
        return
    if config.train.stage in ("align", "align_audio"):
        raise ConfigError(
            f"train.lora.rank adapts the language model, which stage {config.train.stage} leaves alone; use instruct"
        )
    if lora.quantize and ranks.size > 1 and config.train.parallel.strategy == "fsdp2":
        raise ConfigError("weights in four bits cannot be sharded; use train.parallel.strategy=ddp")
    add_adapters(model, lora, device)


def _open_folder(folder: RunFolder, config: Config, start_step: int) -> None:
    folder.create(config)
    folder.rewind(start_step)


def _newest_checkpoint(folder: RunFolder, ranks: Ranks, *, rename_damaged: bool) -> Path | None:
    search = find_checkpoint(folder.checkpoints, ranks)
    if ranks.is_first:
        for path, problem in search.rejected:
            place = set_aside(path) if rename_damaged else path
            logger.warning("checkpoint %s is damaged (%s) and passed over; it lies in %s", path.name, problem, place)
        if search.found is None:
            logger.warning("no checkpoint in %s yet: starting at step 0", folder.checkpoints)
    return search.found


def choose_device(config: Config, ranks: Ranks) -> torch.device:
    """Where this process trains.

    Raises:
        ConfigError: an unknown device, or one that is not there.
    """
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"train.device: {name!r} is unknown; choose auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"train.device is {name}, but torch sees no CUDA device; llava-scale doctor tells more")
    return torch.device("cuda", ranks.local_rank) if name == "cuda" and ranks.size > 1 else torch.device(name)


def choose_precision(config: Config, device: torch.device) -> str:
    """``bf16`` or ``fp32``.

    AVX-512's own bf16 instructions are slower than fp32 in practice, so only AMX counts on a CPU.
    """
    if config.train.precision != "auto":
        return config.train.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    return "bf16" if capabilities.get("amx_bf16") else "fp32"


def _prepare_model(model: nn.Module, recipe: Recipe, config: Config) -> None:
    """Freeze, set modes, and switch on recomputation where it is asked for."""
    apply_recipe(model, recipe)
    half = [name for name, value in model.named_parameters() if value.requires_grad and value.dtype == torch.float16]
    if half:
        raise ConfigError(
            f"model.torch_dtype is float16, whose gradients overflow ({half[0]} ...): train in float32 or bfloat16"
        )
    if config.train.gradient_checkpointing:
        language_model: Any = model.get_submodule("language_model")
        name = "activation_checkpointing_enable"  # its new name in transformers 5
        enable = getattr(language_model, name, None) or language_model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        set_training_modes(model)


def _total_steps(config: Config, stream: BatchStream) -> int:
    if config.train.steps:
        return config.train.steps
    steps = math.ceil(config.train.epochs * stream.steps_per_epoch())
    if steps < 1:
        raise ConfigError("train.steps and train.epochs are both 0: set one of them")
    return steps


def _restore(run: Run) -> None:
    """Put model, optimizer, stream and random generators where the checkpoint left them, or at the run's start."""
    if run.state is None or run.checkpoint is None:
        seed_rank(run.config.seed, run.ranks)  # whatever building the model has drawn
        return
    if run.frozen != run.state.frozen:
        raise CheckpointError(
            f"{run.checkpoint}: the frozen parameters are not those that the run was started with; was a pretrained "
            "model, model.init_from or a library that draws random weights changed since?"
        )
    restore(run.checkpoint, model=run.parts.model, optimizer=run.optimizer, sharded=run.engine.is_sharded)
    run.parts.stream.load_state_dict(run.state.loader)
    if len(run.state.random) == run.ranks.size:
        set_random_states(run.state.random[run.ranks.rank], run.device)
    else:  # another number of processes: fresh draws, the same whenever it is resumed so
        seed_rank(run.config.seed + run.start_step, run.ranks)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
