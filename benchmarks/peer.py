"""What a loader must do to be compared, and ours doing it."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any, ClassVar

import torch
from common import SKIPPED
from corpus import BACKGROUND, SIZE, Corpus
from work import MEAN, STD, Batch, tokenizer_of

Raw = tuple[str, dict, bytes]
"""Key, parsed record, encoded picture."""


class Peer:
    """One library.

    Args:
        corpus: The data.
        work: Original or our way with each sample; ours knows only its own.
        workers: Workers of the loader.
        batch: Samples in a batch.
    """

    needs: ClassVar[str] = ""

    def __init__(self, corpus: Corpus, work: Callable[[Corpus], Any], *, workers: int, batch: int) -> None:
        self.corpus, self.work, self.workers, self.batch = corpus, work, workers, batch

    @classmethod
    def convert(cls, corpus: Corpus) -> None:
        """Write the corpus in the library's own format, if it has one."""

    def batches(self) -> Iterator[Batch]:
        """The full pipeline."""
        raise NotImplementedError

    def raw(self) -> Iterator[Raw]:
        """Every sample once, without workers and without decoding."""
        raise NotImplementedError

    def state(self, num_batches: int) -> bytes:
        """Where the stream stands after ``num_batches``."""
        raise NotImplementedError

    def load(self, state: bytes) -> None:
        """Continue there; before ``batches``."""
        raise NotImplementedError


def require(needs: str) -> None:
    """Import a library, so that no clock counts it; end this run with a message if that fails."""
    try:
        if needs == "streaming":
            without_torchvision()
        for module in needs.split():
            __import__(module)
    except Exception as error:  # an installed library that breaks while it is imported is as good as missing
        print(f"{needs} cannot be imported ({type(error).__name__}: {error})")
        sys.exit(SKIPPED)


def without_torchvision() -> None:
    """streaming imports torchvision for data sets of its own that are not used here; stand in where it is missing."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        import transformers  # noqa: F401  # looks for the real one, so before it is replaced

        from_names = {"datasets": ("VisionDataset", "CIFAR10"), "transforms.functional": ("to_tensor",)}
        for name in ("", "datasets", "transforms", "transforms.functional"):
            full = f"torchvision.{name}" if name else "torchvision"
            module = types.ModuleType(full)
            module.__spec__ = ModuleSpec(full, None)
            for attribute in from_names.get(name, ()):
                setattr(module, attribute, type(attribute, (), {}))
            sys.modules[full] = module


class Ours(Peer):
    """llava_scale."""

    needs = "llava_scale.data.loader llava_scale.model.tokens"
    worker_type: ClassVar[str] = "thread"
    shards: ClassVar[str] = "shards"
    packed: ClassVar[bool] = False
    normalised: ClassVar[bool] = False

    def _open(self) -> Any:
        from llava_scale.config.data import DataConfig, PackingConfig, SourceConfig
        from llava_scale.data.chat import ChatEncoder
        from llava_scale.data.loader import open_stream
        from llava_scale.data.media import ImageTransform
        from llava_scale.model.tokens import MediaCounter

        path = getattr(self.corpus, self.shards)
        packing = PackingConfig(mode="tokens" if self.packed else "samples", samples_per_row=self.batch)
        config = DataConfig(
            sources=(SourceConfig(path=str(path)),),
            packing=packing,
            num_workers=self.workers,
            worker_type=self.worker_type,
            cache_dir=str(self.corpus.folder / "cache"),
        )
        return open_stream(
            config,
            seed=0,
            rows_per_step=1,
            encoder=ChatEncoder(tokenizer_of(self.corpus), "vicuna_v1"),
            counter=MediaCounter(rows=12, cols=12, num_tokens=144),
            image_transform=ImageTransform(SIZE, "pad", BACKGROUND),
        )

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.stream = self._open()

    def batches(self) -> Iterator[Batch]:
        """Rows of a step as batches; ids of each sample as views."""
        for step in self.stream:
            for row in step.rows:
                pixels = _normalised(row.pixel_values) if self.normalised else row.pixel_values
                yield Batch(list(row.keys), pixels, row.input_ids.tensor_split(row.cu_seq_lens[1:-1].long()))

    def raw(self) -> Iterator[Raw]:
        """Through the data set, in blocks as the loader reads."""
        from llava_scale.data.dataset import open_dataset

        dataset = open_dataset(str(self.corpus.shards))
        for start in range(0, len(dataset), self.batch):
            for sample in dataset.samples(range(start, min(len(dataset), start + self.batch))):
                yield sample.key, sample.turns, sample.media["image"][0][1]

    def state(self, num_batches: int) -> bytes:
        """See ``Peer``."""
        return json.dumps(self.stream.state_dict()).encode()

    def load(self, state: bytes) -> None:
        """See ``Peer``."""
        self.stream.load_state_dict(json.loads(state))


class OursInProcesses(Ours):
    """The same with worker processes."""

    worker_type = "process"


class OursOnPrepared(Ours):
    """On shards packed at the model's picture size."""

    shards = "prepared"


class OursOnPreparedInProcesses(Ours):
    """Prepared shards, worker processes."""

    worker_type = "process"
    shards = "prepared"


class OursOnPlain(Ours):
    """On shards packed at the model's picture size without compression."""

    shards = "plain"


class OursNormalised(Ours):
    """Normalised to float on the CPU as the others do, instead of on the model's device."""

    normalised = True


class OursPacked(Ours):
    """Rows filled by tokens."""

    packed = True


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() - 255 * MEAN) / (255 * STD)
