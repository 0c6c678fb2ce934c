"""Energon's task encoder for the benchmark, apart so that the rest runs without Energon."""

from __future__ import annotations

import json
from typing import Any

from megatron.energon import Cooker, DefaultTaskEncoder, Sample, SampleDecoder, basic_sample_keys, edataclass, stateless
from work import collate


@edataclass
class Item(Sample):
    """A cooked sample."""

    picture: Any
    record: Any


@stateless
def cook(sample: dict) -> Item:
    """Take the picture and the record out of a crude sample."""
    return Item(**basic_sample_keys(sample), picture=sample["jpg"], record=sample["json"])


class Encoder(DefaultTaskEncoder):
    """Does ``work`` with each sample; None hands samples over as they were read."""

    cookers = (Cooker(cook),)
    decoder = None

    def __init__(self, work: Any) -> None:
        super().__init__()
        self.work = work

    @stateless
    def encode_sample(self, sample: Item) -> dict:
        """Key, pixels and ids, or the raw sample."""
        record = sample.record if isinstance(sample.record, dict) else json.loads(sample.record)
        if self.work is None:
            return {"key": sample.__key__, "record": record, "picture": sample.picture}
        return {"key": sample.__key__, **self.work(sample.picture, record)}

    @stateless
    def batch(self, samples: list[dict]) -> Any:
        """Stacked, or the raw samples as they are."""
        if self.work is None:
            return [(sample["key"], sample["record"], sample["picture"]) for sample in samples]
        return collate(samples)

    def encode_batch(self, batch: Any) -> Any:
        """As it is."""
        return batch


class PillowEncoder(Encoder):
    """Pictures decoded by Energon itself, with Pillow."""

    decoder = SampleDecoder(image_decode="pil")


def make_encoder(work: Any) -> Encoder:
    """The encoder whose decoding fits ``work``."""
    return PillowEncoder(work) if work is not None and work.decodes == "pil" else Encoder(work)
