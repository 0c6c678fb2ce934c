"""The data that the loaders are compared on, made on the spot: one set of JPEGs, in the format of each library.

``make`` writes pictures and LLaVA JSON, packs them into shards (plain tars, which webdataset and Energon read as well),
and trains a tokenizer on the texts. Each peer's own format is written by ``peers.py`` from the same files.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 336
BACKGROUND = (122, 116, 104)  # CLIP's mean colour, as LLaVA pads
_SIZES = [(500, 375)] * 7 + [(375, 500)] * 2 + [(500, 333)]
_QUALITY = 90
_NUM_SCENES = 24


@dataclass(frozen=True)
class Corpus:
    """The folder that ``make`` filled."""

    folder: Path

    @property
    def images(self) -> Path:
        """Folder of the JPEGs, named by key."""
        return self.folder / "images"

    @property
    def shards(self) -> Path:
        """Faithful shards."""
        return self.folder / "shards"

    @property
    def prepared(self) -> Path:
        """Shards packed with ``--image-size``."""
        return self.folder / "prepared"

    @property
    def plain(self) -> Path:
        """The same with ``--image-format ppm``."""
        return self.folder / "plain"

    @cached_property
    def urls(self) -> list[str]:
        """Paths of the faithful tars."""
        return sorted(str(path) for path in self.shards.glob("*.tar"))

    @cached_property
    def records(self) -> list[dict]:
        """The LLaVA JSON."""
        return json.loads((self.folder / "data.json").read_text())

    @property
    def mean_bytes(self) -> float:
        """Average size of a JPEG."""
        files = list(self.images.glob("*.jpg"))
        return sum(path.stat().st_size for path in files) / len(files)


def make(folder: Path, num_samples: int, num_shards: int) -> Corpus:
    """Write the corpus into ``folder``, or take the one that is there if it was made with the same arguments."""
    from llava_scale.data.prepare import MediaOptions
    from llava_scale.data.write import pack

    corpus = Corpus(folder)
    done = folder / "corpus.json"
    wanted = {"num_samples": num_samples, "num_shards": num_shards}
    if done.exists() and json.loads(done.read_text()) == wanted:
        return corpus
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} holds something else than this corpus; choose another --folder")
    corpus.images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    scenes = [_scene(rng) for _ in range(_NUM_SCENES)]
    words = _words(rng)
    records = []
    for number in range(num_samples):
        key = f"{number:08d}"
        (corpus.images / f"{key}.jpg").write_bytes(_picture(scenes[number % _NUM_SCENES], rng))
        records.append(_record(key, words, rng))
    (folder / "data.json").write_text(json.dumps(records))
    shard_size = -(-num_samples // num_shards)
    prepared = MediaOptions(image_size=SIZE, image_background=BACKGROUND)
    plain = MediaOptions(image_size=SIZE, image_background=BACKGROUND, image_format="ppm")
    for out, options in ((corpus.shards, MediaOptions()), (corpus.prepared, prepared), (corpus.plain, plain)):
        pack(folder / "data.json", out, media_root=corpus.images, shard_size=shard_size, options=options)
    _train_tokenizer(records).save_pretrained(folder / "tokenizer")
    done.write_text(json.dumps(wanted))
    return corpus


def _scene(rng: np.random.Generator) -> np.ndarray:
    """A large picture with detail at every scale, shapes with edges, and grain, like a photo: ``(800, 800, 3)``."""
    side = 800
    total = np.zeros((side, side, 3))
    for octave in range(2, 9):
        cells = rng.normal(size=(2**octave, 2**octave, 3)).mean(2, keepdims=True) + 0.4 * rng.normal(
            size=(2**octave, 2**octave, 3)
        )
        for channel in range(3):
            plane = Image.fromarray(cells[..., channel].astype(np.float32)).resize((side, side), Image.BICUBIC)
            total[..., channel] += np.asarray(plane) * 0.62 ** (octave - 2)
    rows, cols = np.mgrid[:side, :side]
    for _ in range(30):
        row, col, radius = rng.integers(0, side), rng.integers(0, side), rng.integers(10, 120)
        inside = (rows - row) ** 2 + (cols - col) ** 2 < radius**2
        total[inside] += rng.normal(size=3) * 0.8
    grain = rng.normal(size=(side, side, 1)) * 0.115
    levels = 118 + 42 * (total - total.mean()) / total.std() + 60 * grain
    return levels.clip(0, 255).astype(np.uint8)


def _picture(scene: np.ndarray, rng: np.random.Generator) -> bytes:
    width, height = _SIZES[rng.integers(len(_SIZES))]
    top, left = rng.integers(0, scene.shape[0] - height), rng.integers(0, scene.shape[1] - width)
    pixels = scene[top : top + height, left : left + width]
    if rng.integers(2):
        pixels = pixels[:, ::-1]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _words(rng: np.random.Generator) -> list[str]:
    syllables = ["ka", "lo", "mi", "ter", "an", "so", "ren", "vi", "du", "pel", "ing", "sha", "gro", "ne", "st"]
    return ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(3000)]


def _record(key: str, words: list[str], rng: np.random.Generator) -> dict:
    def text(num_words: int) -> str:
        return " ".join(words[min(int(rank), len(words)) - 1] for rank in rng.zipf(1.3, num_words))

    question, answer = text(int(rng.integers(6, 18))), text(int(rng.integers(20, 60)))
    turns = [{"from": "human", "value": f"<image>\n{question}?"}, {"from": "gpt", "value": f"{answer}."}]
    return {"id": key, "image": f"{key}.jpg", "conversations": turns}


def _train_tokenizer(records: list[dict]):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from llava_scale.types import PLACEHOLDERS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    special = [AddedToken(token, special=True, normalized=False) for token in ("</s>", *PLACEHOLDERS.values())]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4000, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
