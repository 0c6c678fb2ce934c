"""Settings of the training loop, and the root of the tree."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llava_scale.config.base import section
from llava_scale.config.data import DataConfig
from llava_scale.config.model import ModelConfig
from llava_scale.errors import ConfigError

NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
LearningRateSchedule = Literal["cosine", "linear"]


@section
class ParallelConfig:
    """How the processes of a run share the work; without effect in a run of one process."""

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """``ddp``: every process holds the whole model; ``fsdp2``: parameters, gradients and optimizer are sharded."""
    replicas: Count = 1
    """Copies of the sharded model (HSDP): the processes form ``replicas`` groups, each with one whole copy."""
    reshard_after_forward: bool = True
    """Drop a block's gathered parameters between forward and backward (ZeRO-3); False keeps them (ZeRO-2)."""
    shard_frozen: bool = True
    """Shard the frozen part of the language model too; False keeps it whole in every process, which saves traffic."""
    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type in which shards are gathered under ``train.precision: bf16``; float32 doubles the traffic."""
    reduce_every_row: bool = False
    """Reduce gradients after every row and hold shards of them only, instead of once a step and hold them whole."""
    cpu_offload: bool = False
    """Keep shards and optimizer state in host memory."""
    timeout_s: Annotated[float, Field(gt=0.0)] = 1800.0
    """Seconds after which a process that waits for the others gives up."""


@section
class LoraConfig:
    """Low-rank adapters instead of whole weights; the weights beside them are frozen."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the adapters; 0 for none."""
    alpha: NonNegative = 16.0
    """Adapters count ``alpha / rank`` times."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout before the adapters."""
    targets: str = ""
    """Regular expression on whole names of linear layers, as ``language_model.*(q|v)_proj``; every linear layer in the
    language model's blocks if empty."""
    dora: bool = False
    """Learn the lengths of the weights' rows as well (DoRA)."""
    quantize: Literal["", "nf4"] = ""
    """Hold the adapted weights in four bits (QLoRA); needs bitsandbytes."""


@section
class TrainConfig:
    """What is trained, for how long, at which rates."""

    stage: Literal["align", "instruct", "align_audio", "instruct_av"] = "instruct"
    """``align`` trains projector and compressors; ``instruct`` also the language model."""
    trainable: dict[str, float] = Field(default_factory=dict)
    """Regular expression on parameter names -> learning rate (0 freezes); later rules win over the stage's."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    """Adapters beside the language model's weights."""
    output_dir: str = "runs/train"
    """Run folder: config, log, checkpoints, final model."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps; 0 derives them from ``epochs``."""
    epochs: NonNegative = 1.0
    """Passes over the training samples, where ``steps`` is 0."""
    rows_per_step: Count = 1
    """Rows (micro-batches) in one global optimizer step, over all ranks; ranks must divide it."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon`` updates weight matrices by orthogonalised momentum and the rest by AdamW: fewer steps for models that
    start from random weights. It needs whole matrices, so not with ``parallel.strategy: fsdp2``."""
    learning_rate: NonNegative = 2e-5
    """Peak learning rate of everything without a rule of its own."""
    warmup_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.03
    """Share of the steps in which the learning rate rises linearly from 0."""
    lr_schedule: LearningRateSchedule = "cosine"
    """How the learning rate falls after that: half a cosine, or a line; constant with ``min_lr_ratio: 1``."""
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Learning rate at the end, as a share of the peak."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled decay; never on biases and norms."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    adam_eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: NonNegative = 1.0
    """Global gradient norm is clipped to this; 0 does not clip."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the matrix work (autocast); weights and optimizer stay in ``model.torch_dtype``. ``auto`` is bf16 where
    the hardware multiplies it faster (CUDA devices from Ampere on, CPUs with AMX), else fp32."""
    gradient_checkpointing: bool = False
    """Recompute the language model's layers in the backward pass instead of holding them."""
    compile: bool = False
    """Compile each block of the language model with torch.compile; takes a minute at the start."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How the processes of a run share the work."""
    max_bad_steps: Count = 5
    """Steps in a row with a non-finite loss or gradient that stop the run."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between held-out evaluations; 0 evaluates at the end only."""
    eval_rows: Count = 64
    """Most rows of one held-out evaluation."""
    save_every: Annotated[int, Field(ge=0)] = 500
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    stop_exit_code: Annotated[int, Field(ge=0, le=255)] = 0
    """Exit code after SIGTERM or SIGUSR1 ended the run with everything saved, for schedulers that requeue on it; 0 is
    128 plus the signal."""
    async_checkpoint: bool = False
    """Write checkpoints in the background; training waits for the copy to host memory only."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the log's lines also go, beside ``log.jsonl``; W&B works offline under ``WANDB_MODE=offline``."""
    profile: Annotated[str, Field(pattern=r"^(\d+:\d+)?$")] = ""
    """Steps to profile, as ``10:13`` for the three after step 10; writes a trace and a table into ``profile/``."""
    peak_tflops: NonNegative = 0.0
    """Matrix throughput of one device in 10^12 operations a second, for the MFU; 0 looks the device up."""
    heartbeat_s: NonNegative = 30.0
    """Seconds between signs of life of each process in ``health/``; 0 for none."""
    stuck_after_s: NonNegative = 900.0
    """Seconds without a finished step after which each process writes the stacks of its threads into ``health/``; 0
    for never."""
    log_every: Count = 10
    """Steps between lines of the log."""
    loss_chunk: Count = 2048
    """Supervised positions whose logits are held at once."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""


@section
class Config:
    """Everything one run needs."""

    name: str = "train"
    """Name of the run in reports."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, sample order and every other draw."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """Which towers, projector and language model."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Which samples, in which order, packed how."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """What is trained, for how long, at which rates."""

    def __post_init__(self) -> None:
        if not (self.model.init_from or self.model.preset or self.model.language_model):
            raise ConfigError("model: set one of init_from, preset or language_model")
        if self.train.optimizer == "muon" and self.train.parallel.strategy == "fsdp2":
            raise ConfigError(
                "train.optimizer: muon needs whole matrices and train.parallel.strategy: fsdp2 shards them; "
                "use ddp, or optimizer: adamw"
            )
