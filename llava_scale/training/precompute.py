"""Features of frozen towers, computed once instead of in every epoch (``llava-scale precompute``).

Nothing random stands before a frozen tower: pictures are decoded and fitted by rule, and the tower has no dropout. So
its features are a function of the file, and a run that reads them learns what it would have learned without.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch

from llava_scale.data.dataset import open_dataset
from llava_scale.data.decoding import decode_others
from llava_scale.data.features import FeatureFolder, FeatureWriter, check_made_with, create_folder
from llava_scale.errors import ConfigError, SampleError
from llava_scale.training.checkpoint import parameter_checksum
from llava_scale.training.parallel import Ranks
from llava_scale.training.recipe import plan_recipe
from llava_scale.types import AudioFeatures

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from llava_scale.config import Config
    from llava_scale.data.dataset import ShardedDataset
    from llava_scale.training.recipe import Recipe
    from llava_scale.types import MediaInfo, MediaKind, Sample

StoredType = Literal["auto", "float32", "bfloat16"]

_TOWERS: dict[MediaKind, str] = {"image": "vision_tower", "video": "vision_tower", "audio": "audio_tower"}
_UNSTABLE = ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")


@dataclass
class Precomputed:
    """What ``precompute`` has done.

    Attributes:
        kinds: Kinds of media.
        num_shards: Shards of which features were written now.
        num_there: Shards that had theirs already.
        num_media: Media whose features were written.
        unusable: Keys of samples that could not be decoded.
        num_bytes: Bytes written.
        seconds: How long it took.
    """

    kinds: tuple[MediaKind, ...]
    num_shards: int = 0
    num_there: int = 0
    num_media: int = 0
    unusable: list[str] = field(default_factory=list)
    num_bytes: int = 0
    seconds: float = 0.0


@torch.no_grad()
def precompute(
    config: Config,
    out: Path,
    *,
    dtype: StoredType = "auto",
    batch_size: int = 32,
    ranks: Ranks | None = None,
    on_shard: Callable[[int, int], None] | None = None,
) -> Precomputed:
    """Write the features of all frozen towers for all data of ``config`` into ``out``; shards that are there are left.

    Args:
        config: Of the run that will read them.
        out: New folder, or one with features of the same towers.
        dtype: ``auto`` is float32 where the run computes in float32, else bfloat16.
        batch_size: Pictures, frames or sounds that go through a tower at once.
        ranks: Processes that share the shards; each calls this.
        on_shard: Called with the number of finished shards of this process, and how many it has.

    Raises:
        ConfigError: no tower is frozen, no data, or ``out`` holds features of something else.
        ShardError: a shard cannot be read.
    """
    from llava_scale.model import build_model
    from llava_scale.training.setup import choose_device, choose_precision

    ranks, started = ranks or Ranks(), time.perf_counter()
    device = choose_device(config, ranks)
    precision = choose_precision(config, device)
    model, processor = build_model(config.model, chat_template=config.data.chat_template, seed=config.seed)
    processor.set_limits(config.data)
    recipe = plan_recipe(model, replace(config.train, lora=type(config.train.lora)()))
    with ExitStack() as cleanup:
        datasets = _open_all(config, cleanup)
        made_with = _chosen(model, processor, recipe, datasets, precision)
        if dtype == "auto":
            exact = precision == "fp32" and config.model.torch_dtype == "float32"
            dtype = "float32" if exact else "bfloat16"
        made_with = {kind: {**made, "dtype": dtype} for kind, made in made_with.items()}
        folder = ranks.from_first(lambda: create_folder(out, made_with))
        encoder = _Encoder(model.to(device).eval(), processor, device, precision == "bf16", batch_size)
        done = Precomputed(kinds=tuple(made_with))
        shards = list(dict.fromkeys((dataset, s) for dataset in datasets for s in range(dataset.num_shards)))
        own = shards[ranks.rank :: ranks.size]
        for number, (dataset, s) in enumerate(own, start=1):
            _write_shard(folder, dataset, s, encoder, dtype, done)
            if on_shard is not None:
                on_shard(number, len(own))
        ranks.any(False)  # nobody leaves before all are done
    done.seconds = time.perf_counter() - started
    return done


def open_features(config: Config, model: Any, processor: Any, precision: str, ranks: Ranks) -> FeatureFolder | None:
    """Features that a run reads; None where ``data.features`` names none.

    Raises:
        ConfigError: there are none, or they were made by other towers or in another way.
    """
    if not config.data.features:
        return None

    def check() -> FeatureFolder:
        folder = FeatureFolder.open(config.data.features)
        if not model.takes_features and {"image", "video"} & set(folder.made_with):
            raise ConfigError(_inside(model))
        expected = {kind: _made_with(kind, model, processor, precision) for kind in folder.made_with}
        check_made_with(folder, expected)
        return folder

    return ranks.from_first(check)


def check_frozen(features: FeatureFolder | None, recipe: Recipe) -> None:
    """Refuse stored features of a tower that is trained.

    Raises:
        ConfigError: names the tower.
    """
    for kind in features.made_with if features is not None else ():
        name = next((name for name in recipe.learning_rates if name.startswith(_TOWERS[kind] + ".")), None)
        if name is not None:
            raise ConfigError(
                f"data.features holds features of kind {kind}, but {_TOWERS[kind]} is trained ({name} ...): freeze it "
                f"(train.trainable, train.lora.targets), or leave data.features out"
            )


def _open_all(config: Config, cleanup: ExitStack) -> list[ShardedDataset]:
    sources = (*config.data.sources, *config.data.eval_sources)
    if not sources:
        raise ConfigError("data.sources is empty: name at least one folder of shards, data.sources=[{path: SHARDS}]")
    datasets = []
    for path in dict.fromkeys(source.path for source in sources):
        datasets.append(open_dataset(path, cache_dir=config.data.cache_dir, cache_size_gb=config.data.cache_size_gb))
        cleanup.callback(datasets[-1].close)
    return datasets


def _chosen(
    model: Any, processor: Any, recipe: Recipe, datasets: Sequence[ShardedDataset], precision: str
) -> dict[MediaKind, dict[str, str]]:
    """Kinds of media in the data that go through a frozen tower, and what their features are made with.

    Raises:
        ConfigError: there is none.
    """
    named = {part for dataset in datasets for name in dataset.info.modalities for part in name.split("+")}
    trained = {name.partition(".")[0] for name in recipe.learning_rates}
    in_data = [kind for kind in _TOWERS if kind in named and kind in processor.media_transforms]
    kinds = [kind for kind in in_data if _TOWERS[kind] not in trained]
    if not model.takes_features and {"image", "video"} & set(kinds):
        raise ConfigError(_inside(model))
    if not kinds:
        why = f"{_TOWERS[in_data[0]]} is trained" if in_data else "the data holds no media that this model takes"
        raise ConfigError(f"there is nothing to compute ahead: {why}")
    return {kind: _made_with(kind, model, processor, precision) for kind in kinds}


def _made_with(kind: MediaKind, model: Any, processor: Any, precision: str) -> dict[str, str]:
    """Everything that the features of a kind depend on but the file, in words or as checksums."""
    tower = getattr(model, _TOWERS[kind], None)
    if tower is None:
        raise ConfigError(f"data.features holds features of kind {kind}, but this model has no {_TOWERS[kind]}")
    described: Any = model.config.audio["tower"] if kind == "audio" else model.config.vision_config.to_dict()
    digest = hashlib.sha256(json.dumps(_stable(described), sort_keys=True, default=repr).encode())
    for name, value in (*tower.named_parameters(), *tower.named_buffers()):
        digest.update(f"{name} {tuple(value.shape)} {parameter_checksum(value.detach().cpu())}\n".encode())
    transform = repr(processor.media_transforms[kind])
    if kind == "audio":
        transform = f"{processor.media_transforms[kind].transform!r} {processor.audio_frontend.fingerprint()}"
    else:
        digest.update(f"{model.config.vision_feature_layer} {tower.feature_select} {tower.image_size}".encode())
    dtype = next((str(value.dtype).removeprefix("torch.") for value in tower.parameters()), "float32")
    return {"tower": digest.hexdigest()[:16], "transform": transform, "precision": f"{precision} ({dtype} weights)"}


def _stable(fields: Any) -> Any:
    if isinstance(fields, dict):
        return {key: _stable(value) for key, value in fields.items() if key not in _UNSTABLE}
    return fields


def _inside(model: Any) -> str:
    return (
        f"features of the vision tower cannot be computed ahead: the compressor {model.config.compressor['type']!r} "
        "looks inside the tower"
    )


def _write_shard(
    folder: FeatureFolder, dataset: ShardedDataset, s: int, encoder: _Encoder, dtype: str, done: Precomputed
) -> None:
    sha256 = dataset.info.sha256[s]
    missing = [kind for kind in folder.made_with if not folder.file(kind, sha256).exists()]
    if not missing:
        done.num_there += 1
        return
    with ExitStack() as cleanup:
        writers = {
            kind: FeatureWriter(folder.file(kind, sha256), row_shape=encoder.row_shape(kind), dtype=dtype)
            for kind in missing
        }
        for writer in writers.values():
            cleanup.callback(writer.discard)
        for block in encoder.encoded(dataset, s, missing, done.unusable):
            for sample in block:
                for kind, writer in writers.items():
                    writer.add_sample(sample[kind])
                    done.num_media += sum(rows is not None for rows in sample[kind])
        done.num_bytes += sum(writer.finish() for writer in writers.values())
    done.num_shards += 1


Encoded = dict["MediaKind", list["Tensor | None"]]
"""Per kind the rows of each medium of a sample."""


class _Encoder:
    """Shards to features: decodes in threads, runs the towers on batches."""

    def __init__(self, model: Any, processor: Any, device: torch.device, half: bool, batch_size: int) -> None:
        self._model, self._device, self._half, self._batch_size = model, device, half, batch_size
        self._transforms = processor.media_transforms

    def row_shape(self, kind: MediaKind) -> tuple[int, ...]:
        """``(N, D)`` of a picture or frame, ``(D,)`` of a sound."""
        tower = getattr(self._model, _TOWERS[kind])
        return (tower.hidden_size,) if kind == "audio" else (tower.num_tokens, tower.hidden_size)

    def encoded(
        self, dataset: ShardedDataset, s: int, kinds: Sequence[MediaKind], unusable: list[str]
    ) -> Iterator[list[Encoded]]:
        """Yield the samples of a shard in their order, a block at a time."""
        numbers = dataset.shard_range(s)
        infos = (dataset.media_infos(number) for number in numbers)
        with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:
            waiting = zip(dataset.samples(numbers), infos, strict=True)
            while block := list(islice(waiting, self._batch_size)):
                decoded = list(pool.map(lambda pair: self._decode(pair[0], pair[1], kinds), block))
                for (sample, _), media in zip(block, decoded, strict=True):
                    if media is None:
                        unusable.append(sample.key)
                yield self._encode(decoded, [of_sample for _, of_sample in block], kinds)

    def _decode(
        self, sample: Sample | SampleError, infos: Sequence[MediaInfo], kinds: Sequence[MediaKind]
    ) -> dict[MediaKind, list[Any]] | None:
        """Per kind what the tower takes of each medium; None for a sample that training will not use either."""
        if isinstance(sample, SampleError):
            return None
        try:
            pictures = sample.media.get("image", ()) if "image" in kinds else ()
            images = [self._transforms["image"](data).unsqueeze(0) for _, data in pictures]
            others = decode_others(sample, infos, self._transforms, [kind for kind in _TOWERS if kind not in kinds])
        except SampleError:
            return None
        return {"image": images, "video": others.frames, "audio": others.sounds}

    def _encode(
        self,
        decoded: Sequence[dict[MediaKind, list[Any]] | None],
        infos: Sequence[Sequence[MediaInfo]],
        kinds: Sequence[MediaKind],
    ) -> list[Encoded]:
        found: list[Encoded] = [{} for _ in decoded]
        for kind in kinds:
            media = [medium for sample in decoded if sample is not None for medium in sample[kind]]
            rows = iter(self._sounds(media) if kind == "audio" else self._frames(media))
            for sample, of_sample, target in zip(decoded, infos, found, strict=True):
                number = sum(info.kind == kind for info in of_sample)
                target[kind] = [None] * number if sample is None else list(islice(rows, number))
        return found

    def _frames(self, media: Sequence[Tensor]) -> list[Tensor]:
        """Features ``(F, N, D)`` of pictures or videos ``(F, 3, H, W)``."""
        if not media:
            return []
        batches = torch.split(torch.cat(list(media)), self._batch_size)
        with self._precision():
            rows = [self._model.vision_tower(batch.to(self._device)).cpu() for batch in batches]
        return list(torch.split(torch.cat(rows), [len(medium) for medium in media]))

    def _sounds(self, media: Sequence[AudioFeatures]) -> list[Tensor]:
        """Features ``(N, D)`` of sounds."""
        found = []
        for sound in media:
            given = AudioFeatures(sound.values.to(self._device), sound.lengths.to(self._device))
            with self._precision():
                found.append(self._model.audio_tower.encode(given).cpu())
        return found

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._half)
