"""Settings of the data stream: which shards, in which order, packed how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llava_scale.config.base import section
from llava_scale.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]


@section
class SourceConfig:
    """One data set of a mixture."""

    path: str
    """Folder or URL that holds ``dataset.json`` (or bare ``*.tar`` shards)."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Relative share of the samples drawn from this data set."""
    name: str = ""
    """Name in logs and counters; the folder's name if empty."""


@section
class PackingConfig:
    """How samples are laid into rows; a row is one micro-batch."""

    mode: Literal["tokens", "samples"] = "tokens"
    """``tokens`` fills rows of ``row_length`` tokens; ``samples`` puts ``samples_per_row`` samples in each."""
    row_length: Annotated[int, Field(ge=8)] = 4096
    """Longest row in tokens; a longer sample is an error, or cut under ``data.truncate: text``."""
    samples_per_row: Count = 16
    """Samples in a row under ``mode: samples``."""
    lookahead_rows: Count = 32
    """Rows' worth of samples to choose from when a row is filled under ``mode: tokens``; more fill better."""


@section
class DataConfig:
    """Where samples come from and how they become rows."""

    sources: tuple[SourceConfig, ...] = ()
    """Data sets to mix for training."""
    eval_sources: tuple[SourceConfig, ...] = ()
    """Data sets for evaluation during training; with ``holdout`` the held-out part of ``sources`` if empty."""
    holdout: Fraction = 0.0
    """Share of the training samples kept for evaluation, chosen by the hash of their key."""
    chat_template: str = "native"
    """``plain``, ``vicuna_v1``, or ``native`` for the language model's own template."""
    packing: PackingConfig = Field(default_factory=PackingConfig)
    """How samples are laid into rows."""
    truncate: Literal["error", "text"] = "error"
    """Samples longer than a row: an error, or cut their text (never their media tokens)."""
    block_size: Count = 16
    """Neighbouring samples that are fetched together."""
    shuffle_blocks: Count = 64
    """Blocks in the window inside which samples are shuffled."""
    shuffle: bool = True
    """False reads samples in the order of the shards."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Loader workers of each rank; 0 builds rows in the training process."""
    worker_type: Literal["thread", "process"] = "thread"
    """Threads start at once and share memory; processes suit decoders that hold the interpreter lock."""
    prefetch_rows: Count = 4
    """Rows prepared ahead per worker."""
    features: str = ""
    """Folder of tower features that ``llava-scale precompute`` made of this data: read instead of decoding media and
    running the frozen towers."""
    max_bad_fraction: Fraction = 0.01
    """Share of unusable samples that stops the run (checked after the first 1,000)."""
    max_bad_in_a_row: Count = 100
    """Unusable samples in a row that stop the run."""
    max_image_pixels: Count = 100_000_000
    """Pictures with more pixels are refused before they are decoded."""
    max_media_seconds: Annotated[float, Field(gt=0.0)] = 7_200.0
    """Longer videos and sounds are refused; a clip of one may still be used."""
    partial: Literal["forbid", "allow"] = "forbid"
    """Videos and sounds that are damaged or cut off: a bad sample, or what can be decoded of them (the nearest readable
    frame, silence)."""
    cache_dir: str = ""
    """Folder for indexes, token lengths and remote shards; ``~/.cache/llava_scale`` if empty."""
    cache_size_gb: Annotated[float, Field(ge=0.0)] = 0.0
    """Limit of the local copy of remote shards in GB; 0 reads ranges without a local copy."""

    def __post_init__(self) -> None:
        if self.holdout and self.eval_sources:
            raise ConfigError("data.holdout and data.eval_sources exclude each other: set one of them")
