"""The loaders that are compared, each behind the same few methods. Libraries are imported only where they are used."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corpus import Corpus
from peer import (
    Ours,
    OursInProcesses,
    OursNormalised,
    OursOnPlain,
    OursOnPrepared,
    OursOnPreparedInProcesses,
    OursPacked,
    Peer,
    Raw,
    without_torchvision,
)
from work import Batch, OriginalWork, OurWork, collate


class WebDataset(Peer):
    """webdataset's own pipeline with shuffling, as its documentation shows it."""

    needs = "webdataset"
    skipped = 0

    def batches(self) -> Iterator[Batch]:
        """Shards split over workers, a shuffle buffer, batches made in the workers."""
        import webdataset as wds

        work = self.work(self.corpus)
        data = wds.WebDataset(self.corpus.urls, shardshuffle=100, seed=0).shuffle(200, seed=0)
        data = (data.decode(work.decodes) if work.decodes else data).map(partial(_apply_to_dict, work))
        data = data.batched(self.batch, collation_fn=collate)
        loader = wds.WebLoader(data, batch_size=None, num_workers=self.workers)
        for number, found in enumerate(loader):
            if number >= self.skipped:
                yield Batch(**found)

    def raw(self) -> Iterator[Raw]:
        """Bytes of each sample; the record is parsed here."""
        import webdataset as wds

        for sample in wds.WebDataset(self.corpus.urls, shardshuffle=False):
            yield sample["__key__"], json.loads(sample["json"]), sample["jpg"]

    def state(self, num_batches: int) -> bytes:
        """It has none: resuming means reading and dropping what came before."""
        return str(num_batches).encode()

    def load(self, state: bytes) -> None:
        """See ``Peer``."""
        self.skipped = int(state)


class OriginalWay(WebDataset):
    """LLaVA-style: webdataset with decode("pil"), no shuffle, torch's DataLoader with a collator."""

    def batches(self) -> Iterator[Batch]:
        """Samples are made in the workers and collated there."""
        import webdataset as wds

        work = self.work(self.corpus)
        data = wds.WebDataset(self.corpus.urls, shardshuffle=False).decode("pil").map(partial(_apply_to_dict, work))
        loader = torch.utils.data.DataLoader(data, batch_size=self.batch, num_workers=self.workers, collate_fn=collate)
        for found in loader:
            yield Batch(**found)


def _apply_to_dict(work: Any, sample: dict) -> dict:
    record = sample["json"]
    record = record if isinstance(record, dict) else json.loads(record)
    return {"key": sample["__key__"], **work(sample["jpg"], record)}


class Energon(Peer):
    """Megatron-Energon, on the same tars."""

    needs = "megatron.energon"

    @classmethod
    def convert(cls, corpus: Corpus) -> None:
        """Index the tars (linked into a folder of its own, where Energon writes beside them)."""
        from megatron.energon.flavors import BaseWebdatasetFactory

        folder = corpus.folder / "energon"
        if (folder / ".nv-meta" / "dataset.yaml").exists():
            return
        folder.mkdir(exist_ok=True)
        names = []
        for url in corpus.urls:
            names.append(Path(url).name)
            link = folder / names[-1]
            if not link.exists():
                os.link(url, link)
        BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=2)
        (folder / ".nv-meta" / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors: {}\n"
        )

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._loader: Any = None

    def _data(self, work: Any, workers: int, *, shuffle: int | None) -> Any:
        from energon_encoder import make_encoder
        from megatron.energon import WorkerConfig, get_train_dataset

        return get_train_dataset(
            self.corpus.folder / "energon",
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
            batch_size=self.batch,
            shuffle_buffer_size=shuffle,
            max_samples_per_sequence=100,
            task_encoder=make_encoder(work),
        )

    def _open(self) -> Any:
        from megatron.energon import get_savable_loader

        if self._loader is None:
            self._loader = get_savable_loader(self._data(self.work(self.corpus), self.workers, shuffle=200))
        return self._loader

    def batches(self) -> Iterator[Batch]:
        """Cooking, encoding and batching in its workers."""
        for found in self._open():
            yield Batch([key.rpartition("/")[2] for key in found["keys"]], found["pixel_values"], found["input_ids"])

    def raw(self) -> Iterator[Raw]:
        """As many samples as there are, of an endless stream without shuffle buffer."""
        from megatron.energon import get_loader

        left = len(self.corpus.records)
        for found in get_loader(self._data(None, 0, shuffle=None)):
            for sample in found:
                yield sample
                left -= 1
                if not left:
                    return

    def state(self, num_batches: int) -> bytes:
        """See ``Peer``."""
        return pickle.dumps(self._loader.save_state_rank())

    def load(self, state: bytes) -> None:
        """See ``Peer``."""
        self._open().restore_state_rank(pickle.loads(state))


class Streaming(Peer):
    """mosaicml-streaming: MDS files, its data loader."""

    needs = "streaming"

    @classmethod
    def convert(cls, corpus: Corpus) -> None:
        """Write MDS."""
        folder = corpus.folder / "mds"
        if folder.exists():
            return
        without_torchvision()
        from streaming import MDSWriter

        columns = {"key": "str", "jpg": "bytes", "record": "str"}
        limit = int(corpus.mean_bytes * len(corpus.records) / len(corpus.urls))
        with MDSWriter(out=str(folder), columns=columns, size_limit=limit) as writer:
            for record in corpus.records:
                data = (corpus.images / record["image"]).read_bytes()
                writer.write({"key": record["id"], "jpg": data, "record": json.dumps(record)})

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._loader: Any = None

    def _open(self) -> Any:
        without_torchvision()
        from streaming import StreamingDataLoader, StreamingDataset

        if self._loader is None:
            work = self.work(self.corpus)
            data = StreamingDataset(
                local=str(self.corpus.folder / "mds"), shuffle=True, batch_size=self.batch, shuffle_seed=0
            )
            to_batch = partial(_work_and_collate, work)
            self._loader = StreamingDataLoader(
                data, batch_size=self.batch, num_workers=self.workers, collate_fn=to_batch
            )
        return self._loader

    def batches(self) -> Iterator[Batch]:
        """Epoch after epoch."""
        while True:
            for found in self._open():
                yield Batch(**found)

    def raw(self) -> Iterator[Raw]:
        """In order, in this process."""
        without_torchvision()
        from streaming import StreamingDataset

        for sample in StreamingDataset(local=str(self.corpus.folder / "mds"), shuffle=False, batch_size=1):
            yield sample["key"], json.loads(sample["record"]), sample["jpg"]

    def state(self, num_batches: int) -> bytes:
        """See ``Peer``."""
        return json.dumps(self._loader.state_dict()).encode()

    def load(self, state: bytes) -> None:
        """See ``Peer``."""
        self._open().load_state_dict(json.loads(state))


def _work_and_collate(work: Any, samples: list[dict]) -> dict:
    return collate([{"key": s["key"], **work(bytes(s["jpg"]), json.loads(s["record"]))} for s in samples])


class LitData(Peer):
    """litdata: optimised chunks, its data loader."""

    needs = "litdata"

    @classmethod
    def convert(cls, corpus: Corpus) -> None:
        """Write chunks of 16 MB."""
        folder = corpus.folder / "litdata"
        if folder.exists():
            return
        from litdata import optimize

        items = [(record["id"], str(corpus.images / record["image"]), json.dumps(record)) for record in corpus.records]
        optimize(
            _litdata_item, items, str(folder), chunk_bytes="16MB", num_workers=1, verbose=False, keep_data_ordered=True
        )

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._loader: Any = None

    def _open(self) -> Any:
        from litdata import StreamingDataLoader, StreamingDataset

        if self._loader is None:
            data = StreamingDataset(str(self.corpus.folder / "litdata"), shuffle=True, seed=0)
            to_batch = partial(_work_and_collate, self.work(self.corpus))
            self._loader = StreamingDataLoader(
                data, batch_size=self.batch, num_workers=self.workers, collate_fn=to_batch
            )
        return self._loader

    def batches(self) -> Iterator[Batch]:
        """Epoch after epoch."""
        while True:
            for found in self._open():
                yield Batch(**found)

    def raw(self) -> Iterator[Raw]:
        """In order, in this process."""
        from litdata import StreamingDataset

        for sample in StreamingDataset(str(self.corpus.folder / "litdata"), shuffle=False):
            yield sample["key"], json.loads(sample["record"]), sample["jpg"]

    def state(self, num_batches: int) -> bytes:
        """See ``Peer``."""
        return pickle.dumps(self._loader.state_dict())

    def load(self, state: bytes) -> None:
        """See ``Peer``."""
        self._open().load_state_dict(pickle.loads(state))


def _litdata_item(item: tuple[str, str, str]) -> dict:
    key, path, record = item
    return {"key": key, "jpg": Path(path).read_bytes(), "record": record}


PIPELINES: dict[str, tuple[type[Peer], Any]] = {
    "ours, threads": (Ours, OurWork),
    "ours, processes": (OursInProcesses, OurWork),
    "ours, threads, normalised on the CPU": (OursNormalised, OurWork),
    "ours, prepared shards, threads": (OursOnPrepared, OurWork),
    "ours, prepared without compression, threads": (OursOnPlain, OurWork),
    "ours, prepared shards, processes": (OursOnPreparedInProcesses, OurWork),
    "original way": (OriginalWay, OriginalWork),
    "webdataset": (WebDataset, OriginalWork),
    "webdataset with our transforms": (WebDataset, OurWork),
    "Energon": (Energon, OriginalWork),
    "mosaicml-streaming": (Streaming, OriginalWork),
    "litdata": (LitData, OriginalWork),
}
READERS: dict[str, type[Peer]] = {
    "ours": Ours,
    "webdataset": WebDataset,
    "litdata": LitData,
    "mosaicml-streaming": Streaming,
    "Energon": Energon,
}
RESUMERS: dict[str, type[Peer]] = {
    "ours, threads": Ours,
    "ours, threads, packed by tokens": OursPacked,
    "ours, processes": OursInProcesses,
    "Energon": Energon,
    "mosaicml-streaming": Streaming,
    "litdata": LitData,
    "webdataset by skipping": WebDataset,
}
