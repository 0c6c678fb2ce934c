"""Data sets in memory, shards made on the spot, and a stream over them in one line."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_scale.config.data import DataConfig, PackingConfig, SourceConfig
from llava_scale.data.chat import ChatEncoder, EncodedText
from llava_scale.data.index import key_hash
from llava_scale.data.loader import StreamingLoader, open_stream
from llava_scale.data.media import ImageTransform
from llava_scale.errors import SampleError
from llava_scale.model.tokens import MediaCounter
from llava_scale.types import PLACEHOLDERS, MediaInfo, MediaTokens, Sample, Turn

COUNTER = MediaCounter(rows=2, cols=3, num_tokens=6)
TRANSFORM = ImageTransform(size=8)


class MemoryIndex:
    """The columns of one shard of a ``MemoryDataset``."""

    tar_bytes = 0
    tar_sha256 = ""

    def __init__(self, dataset: MemoryDataset, numbers: range) -> None:
        self.name = f"{dataset.name}-{numbers.start}"
        self.num_samples = len(numbers)
        self.key_hashes = np.array([key_hash(dataset.key(number)) for number in numbers], dtype=np.uint64)
        self._infos = [dataset.media_infos(number) for number in numbers]

    def media_infos_of(self, numbers):
        return [self._infos[number] for number in numbers.tolist()]


@dataclass
class MemoryDataset:
    """``lengths[i]`` text tokens and ``images[i]`` pictures in sample ``i``; a negative length is a broken record."""

    lengths: list[int]
    images: list[int] = field(default_factory=list)
    shard_size: int = 10
    name: str = "memory"
    path: str = "memory"
    num_reads: int = 0
    indexes: dict[int, MemoryIndex] = field(default_factory=dict, repr=False)

    def __len__(self):
        return len(self.lengths)

    @property
    def num_shards(self):
        return -(-len(self) // self.shard_size)

    def shard_name(self, s):
        return f"{self.name}-{s:05d}.tar"

    def shard_range(self, s):
        return range(s * self.shard_size, min(len(self), (s + 1) * self.shard_size))

    def locate(self, i):
        return divmod(i, self.shard_size)

    def index(self, s):
        if s not in self.indexes:
            self.indexes[s] = MemoryIndex(self, self.shard_range(s))
        return self.indexes[s]

    def key(self, i):
        return f"{self.name}/{i}"

    def media_infos(self, i):
        return (MediaInfo(kind="image", width=4, height=4, num_frames=1),) * (self.images[i] if self.images else 0)

    def turns(self, i):
        if self.lengths[i] < 0:
            raise SampleError("its json cannot be read", shard=self.shard_name(self.locate(i)[0]), key=self.key(i))
        return (Turn("user", "x" * self.lengths[i] + "i" * len(self.media_infos(i))), Turn("assistant", ""))

    def samples(self, numbers):
        self.num_reads += len(numbers)
        found = []
        for i in numbers:
            try:
                media = {"image": (("jpg", b"picture"),) * len(self.media_infos(i))} if self.media_infos(i) else {}
                shard = self.shard_name(self.locate(i)[0])
                found.append(Sample(key=self.key(i), shard=shard, turns=self.turns(i), media=media))
            except SampleError as error:
                found.append(error)
        return found

    def prefetch(self, numbers, *, text_only=False):
        pass

    def fingerprint(self):
        return f"{self.name} {self.lengths} {self.images} {self.shard_size}"


class LetterEncoder:
    """One token a letter; ``i`` is the placeholder of a picture; all but the first letter are supervised."""

    def __init__(self):
        self.placeholder_ids = {"image": 9, "video": 10, "audio": 11}

    def encode(self, turns):
        text = turns[0].text
        ids = [9 if letter == "i" else 1 + number % 7 for number, letter in enumerate(text)]
        return EncodedText(ids, ((1, len(ids)),))

    def fingerprint(self):
        return "letters"


@dataclass
class RampCounter:
    """A picture takes ``start`` tokens, ``change`` more at every step, and ``final`` at evaluation."""

    start: int = 4
    change: int = 0
    final: int = 4

    def count(self, info, *, step):
        count = self.final if step is None else max(1, self.start + self.change * step)
        return MediaTokens(grid=(1, 1, count), num_tokens=count)

    def fingerprint(self):
        return repr(self)


def grey(data: bytes) -> torch.Tensor:
    if data == b"broken":
        raise SampleError("damaged picture")
    return torch.full((3, 2, 2), 128, dtype=torch.uint8)


def memory_stream(datasets, cache, *, rows_per_step=2, counter=None, transforms=None, seed=0, weights=None, **options):
    """A stream over data sets in memory; keyword arguments are those of ``StreamingLoader`` or of ``DataConfig``."""
    stream_options = {
        name: options.pop(name) for name in ("rank", "world_size", "split", "skipped_log") if name in options
    }
    packing = {name: options.pop(name) for name in PackingConfig.__dataclass_fields__ if name in options}
    weights = weights or [1.0] * len(datasets)
    config = DataConfig(
        sources=tuple(SourceConfig(path=d.path, name=d.name, weight=w) for d, w in zip(datasets, weights, strict=True)),
        packing=PackingConfig(**{"row_length": 64, "lookahead_rows": 4, **packing}),
        cache_dir=str(cache),
        **{"num_workers": 0, "block_size": 4, "shuffle_blocks": 3, **options},
    )
    return StreamingLoader(
        datasets,
        config,
        seed=seed,
        rows_per_step=rows_per_step,
        encoder=LetterEncoder(),
        counter=counter or RampCounter(),
        transforms={"image": grey} if transforms is None else transforms,
        **stream_options,
    )


def take(stream, num_steps):
    """The next steps of a stream."""
    batches = iter(stream)
    return [next(batches) for _ in range(num_steps)]


def keys(batches):
    """Keys of every row of every batch."""
    return [[row.keys for row in batch.rows] for batch in batches]


def same_rows(first, second):
    """Whether two lists of batches are equal to the last bit."""
    pairs = [(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x.rows, y.rows, strict=True)]
    return keys(first) == keys(second) and all(
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.cu_seq_lens, b.cu_seq_lens)
        and (a.pixel_values is None) == (b.pixel_values is None)
        and (a.pixel_values is None or torch.equal(a.pixel_values, b.pixel_values))
        and (a.step, a.image_num_tokens) == (b.step, b.image_num_tokens)
        for a, b in pairs
    )


def byte_encoder() -> ChatEncoder:
    """A real encoder with one token a byte and ChatML turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: n for n, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["</s>", *PLACEHOLDERS.values()]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    return ChatEncoder(wrapped, "vicuna_v1")


def picture(width: int = 12, height: int = 8, colour: tuple[int, int, int] = (200, 30, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, num_samples: int, *, shard_size: int = 10, broken: tuple[int, ...] = ()) -> Path:
    """Shards of captioned pictures, every fourth sample text only; pictures of ``broken`` samples are damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, num_samples, shard_size):
        with tarfile.open(folder / f"shard-{start // shard_size:05d}.tar", "w") as tar:
            for number in range(start, min(num_samples, start + shard_size)):
                for ext, data in _members(number, broken=number in broken).items():
                    member = tarfile.TarInfo(f"k{number}.{ext}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def _members(number: int, *, broken: bool) -> dict[str, bytes]:
    with_picture = number % 4 != 3
    question = "<image>\nWhat is it?" if with_picture else "Say it."
    answer = " ".join(["red"] * (1 + number % 9))
    record = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    files = {"json": json.dumps(record).encode()}
    if with_picture:
        data = picture(colour=(number % 256, 90, 90))
        files["png"] = data[:40] + bytes(20) + data[60:] if broken else data
    return files


def shard_stream(folder, cache, *, rows_per_step=2, seed=0, **options):
    """A stream over real shards with the real encoder; keyword arguments as for ``memory_stream``."""
    names = ("rank", "world_size", "split", "skipped_log", "pin_memory")
    stream_options = {name: options.pop(name) for name in names if name in options}
    packing = {name: options.pop(name) for name in PackingConfig.__dataclass_fields__ if name in options}
    config = DataConfig(
        sources=(SourceConfig(path=str(folder), name="shards"),),
        packing=PackingConfig(**{"row_length": 512, "lookahead_rows": 4, **packing}),
        cache_dir=str(cache),
        **{"num_workers": 0, "block_size": 4, "shuffle_blocks": 3, **options},
    )
    return open_stream(
        config,
        seed=seed,
        rows_per_step=rows_per_step,
        encoder=byte_encoder(),
        counter=COUNTER,
        image_transform=TRANSFORM,
        **stream_options,
    )
