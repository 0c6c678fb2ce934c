"""What is done with each sample: the original way (Pillow and the Hugging Face processor), or ours.

Both give pixels of 336 x 336 padded with the mean colour, and the tokens of the conversation in ``vicuna_v1``. The
original way tokenises once and makes no labels, so its figures flatter it a little.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from corpus import BACKGROUND, SIZE, Corpus
from PIL import Image

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@dataclass
class Batch:
    """What a loader hands over; ``input_ids`` one tensor or list a sample, maybe padded."""

    keys: list[str]
    pixel_values: torch.Tensor
    input_ids: Any
    state: Any = None


def tokenizer_of(corpus: Corpus) -> Any:
    """The corpus's tokenizer."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(corpus.folder / "tokenizer")


def expand_to_square(image: Image.Image) -> Image.Image:
    """LLaVA's padding, in Pillow."""
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), BACKGROUND)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class OriginalWork:
    """Pillow, padding, the CLIP image processor, one call of the tokenizer."""

    decodes = "pil"

    def __init__(self, corpus: Corpus) -> None:
        from transformers import CLIPImageProcessorPil

        from llava_scale.data.templates import VICUNA_SYSTEM

        self._system = VICUNA_SYSTEM
        self._tokenizer = tokenizer_of(corpus)
        self._processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})

    def __call__(self, picture: Any, record: dict) -> dict[str, torch.Tensor]:
        """``picture`` is encoded, or a Pillow image."""
        image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
        image = expand_to_square(image.convert("RGB"))
        pixels = self._processor(image, return_tensors="pt")["pixel_values"][0]
        question, answer = (turn["value"] for turn in record["conversations"])
        text = f"{self._system} USER: {question} ASSISTANT: {answer}</s>"
        ids = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
        return {"pixel_values": pixels, "input_ids": ids}


class OurWork:
    """Our transform and encoder, for use inside other loaders."""

    decodes = None

    def __init__(self, corpus: Corpus) -> None:
        from llava_scale.data.chat import ChatEncoder
        from llava_scale.data.media import ImageTransform

        self._transform = ImageTransform(SIZE, "pad", BACKGROUND)
        self._encoder = ChatEncoder(tokenizer_of(corpus), "vicuna_v1")

    def __call__(self, picture: bytes, record: dict) -> dict[str, torch.Tensor]:
        """Pixels stay uint8."""
        from llava_scale.data.records import parse_record

        encoded = self._encoder.encode(parse_record(record, {"image": 1}))
        return {"pixel_values": self._transform(picture), "input_ids": torch.tensor(encoded.input_ids)}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the pictures and pad the texts, as LLaVA's collator does."""
    return {
        "keys": [sample["key"] for sample in samples],
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "input_ids": torch.nn.utils.rnn.pad_sequence([sample["input_ids"] for sample in samples], batch_first=True),
    }


def levels(pixel_values: torch.Tensor) -> torch.Tensor:
    """Pixels on the scale of 0 to 255, however they were handed over."""
    if pixel_values.dtype == torch.uint8:
        return pixel_values.float()
    return (pixel_values * STD + MEAN) * 255


def parity(corpus: Corpus, batch: Batch) -> dict[str, float | bool]:
    """Largest and mean distance of pixels to the original way, and whether the tokens are the same."""
    reference = OriginalWork(corpus)
    tokenizer = tokenizer_of(corpus)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    records = {record["id"]: record for record in corpus.records}
    worst, means, same = 0.0, [], True
    for key, pixels, ids in zip(batch.keys, batch.pixel_values, batch.input_ids, strict=True):
        wanted = reference((corpus.images / f"{key}.jpg").read_bytes(), records[key])
        error = (levels(pixels) - levels(wanted["pixel_values"])).abs()
        worst = max(worst, float(error.max()))
        means.append(float(error.mean()))
        same = same and _plain(ids.tolist(), image_id) == _plain(wanted["input_ids"].tolist(), image_id)
    return {"worst_level": worst, "mean_level": sum(means) / len(means), "same_tokens": same}


def _plain(ids: list[int], image_id: int) -> list[int]:
    """Ids without padding behind the end, and with each run of picture tokens as one."""
    kept = [token for place, token in enumerate(ids) if token != image_id or place == 0 or ids[place - 1] != image_id]
    while kept and kept[-1] == 0:
        kept.pop()
    return [*kept, 0] if ids and 0 in ids else kept
