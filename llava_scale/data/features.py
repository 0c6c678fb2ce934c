"""Features of frozen towers, computed ahead of training: a folder that is written once and read by the loader.

::

    features.json                what the features were made with, per kind of media
    image/0f3c....safetensors    one file a shard, named by the checksum of its tar
    video/...  audio/...

A file holds ``features`` (pictures and frames ``(R, N, D)``, sounds ``(R, D)``), ``starts`` (``M + 1`` row offsets of
the media) and ``first`` (``S + 1`` media offsets of the samples), all in the order of the shard. A medium without rows
could not be decoded. Files are mapped into memory: only the rows that are asked for are read.

Legend: ``R`` rows, ``M`` media, ``S`` samples, ``N`` features of a picture, ``D`` width.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from llava_scale.data.files import publish, sync, temporary_name, write_atomic
from llava_scale.errors import ConfigError, ShardError
from llava_scale.types import MEDIA_KINDS, MediaKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from llava_scale.data.dataset import ShardedDataset

DESCRIPTION = "features.json"
FORMAT_VERSION = 1

Rows = NDArray[Any]
"""Features as they are stored: float32, or bfloat16 as the int16 of the same bits."""

_HEADER = 1 << 10  # bytes before the first value; the header is filled up with blanks
_OPEN_FILES = 64
_TYPES: dict[str, tuple[str, int]] = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
_STORED_AS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<i2"), "I64": np.dtype("<i8")}


def join_rows(parts: Sequence[Rows]) -> Tensor | None:
    """Stored rows end to end as one tensor; None where there are none."""
    if not parts:
        return None
    joined = torch.from_numpy(np.concatenate(parts))
    return joined.view(torch.bfloat16) if joined.dtype == torch.int16 else joined


@dataclass(frozen=True, slots=True)
class ShardFeatures:
    """The features of one kind of media of one shard, mapped into memory."""

    features: Rows
    starts: NDArray[np.int64]
    first: NDArray[np.int64]

    @classmethod
    def open(cls, path: Path) -> ShardFeatures:
        """Map a file.

        Raises:
            ShardError: it is damaged.
        """
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            found: dict[str, Rows] = {}
            for name in ("features", "starts", "first"):
                entry = header[name]
                begin, end = entry["data_offsets"]
                shape, kind = tuple(entry["shape"]), _STORED_AS[entry["dtype"]]
                if _HEADER + end > path.stat().st_size:
                    raise ValueError("it is cut off")
                empty = begin == end  # nothing to map
                found[name] = np.zeros(shape, kind) if empty else np.memmap(path, kind, "r", _HEADER + begin, shape)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(
                f"{path}: damaged features ({error}); delete the file and run llava-scale precompute again"
            ) from error
        return cls(**found)

    def of_sample(self, number: int) -> list[Rows]:
        """Rows of each medium of the sample ``number`` of the shard."""
        media = range(int(self.first[number]), int(self.first[number + 1]))
        return [self.features[int(self.starts[medium]) : int(self.starts[medium + 1])] for medium in media]


class FeatureFolder:
    """Features of every shard of some data sets, for reading. Thread-safe; pickling reopens files on the other side.

    Attributes:
        path: The folder.
        made_with: Per kind of media what its features were made with.
    """

    def __init__(self, path: Path, made_with: dict[MediaKind, dict[str, str]]) -> None:
        self.path, self.made_with = path, made_with
        self._files: OrderedDict[tuple[MediaKind, str], ShardFeatures] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> FeatureFolder:
        """Open a folder that ``llava-scale precompute`` has made.

        Raises:
            ConfigError: it is none.
        """
        folder = Path(path)
        try:
            content = json.loads((folder / DESCRIPTION).read_text("utf-8"))
            version, made_with = content["format_version"], dict(content["kinds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"data.features: {folder} holds no features ({error}); make them: "
                f"llava-scale precompute CONFIG {folder}"
            ) from None
        if version != FORMAT_VERSION:
            raise ConfigError(f"data.features: {folder} is of format {version}, this program reads {FORMAT_VERSION}")
        return cls(folder, made_with)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "made_with": self.made_with}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def file(self, kind: MediaKind, sha256: str) -> Path:
        """Where the features of a shard lie."""
        return self.path / kind / f"{sha256}.safetensors"

    def check_covers(self, datasets: Sequence[ShardedDataset]) -> None:
        """Refuse data of which a shard has no features.

        Raises:
            ConfigError: names the first one.
        """
        for kind in self.made_with:
            there = {path.stem for path in (self.path / kind).glob("*.safetensors")}
            for dataset in datasets:
                missing = [s for s, sha256 in enumerate(dataset.info.sha256) if sha256 not in there]
                if missing:
                    raise ConfigError(
                        f"data.features: {self.path} has no features of kind {kind} for {len(missing)} of "
                        f"{dataset.num_shards} shards of {dataset.path} (first: {dataset.shard_name(missing[0])}; "
                        f"new, or changed since); add them: llava-scale precompute CONFIG {self.path}"
                    )

    def read(self, dataset: ShardedDataset, number: int) -> dict[MediaKind, list[Rows]]:
        """Rows of each medium of a sample, for every kind that the folder holds.

        Raises:
            ShardError: the shard has none, or they are damaged.
        """
        s, j = dataset.locate(number)
        sha256 = dataset.info.sha256[s]
        return {kind: self._open(kind, sha256).of_sample(j) for kind in self.made_with}

    def _open(self, kind: MediaKind, sha256: str) -> ShardFeatures:
        with self._lock:
            found = self._files.get((kind, sha256))
            if found is not None:
                self._files.move_to_end((kind, sha256))
                return found
        opened = ShardFeatures.open(self.file(kind, sha256))
        with self._lock:
            self._files[kind, sha256] = opened
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return opened


def create_folder(path: Path, made_with: Mapping[MediaKind, Mapping[str, str]]) -> FeatureFolder:
    """Make a folder for features, or open one to which more shards are added.

    Raises:
        ConfigError: it holds features that were made with something else, or cannot be written.
    """
    wanted = {kind: dict(made_with[kind]) for kind in MEDIA_KINDS if kind in made_with}
    if (path / DESCRIPTION).exists():
        folder = FeatureFolder.open(path)
        if folder.made_with != wanted:
            raise ConfigError(f"{path} {_differences(folder.made_with, wanted)}; choose another folder")
        return folder
    try:
        for kind in wanted:
            (path / kind).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format_version": FORMAT_VERSION, "kinds": wanted}, indent=1)
        write_atomic(path / DESCRIPTION, f"{text}\n".encode())
    except OSError as error:
        raise ConfigError(f"cannot write into {path}: {error.strerror or error}; choose another folder") from None
    return FeatureFolder(path, wanted)


def check_made_with(folder: FeatureFolder, expected: Mapping[MediaKind, Mapping[str, str]]) -> None:
    """Refuse features that this run's towers would not make.

    Args:
        folder: The features.
        expected: Per kind what the run's own would be made with; values that it does not name may be anything.

    Raises:
        ConfigError: says what differs.
    """
    known = {
        kind: {name: value for name, value in made.items() if name in expected.get(kind, made)}
        for kind, made in folder.made_with.items()
    }
    wanted = {kind: dict(expected.get(kind, {})) for kind in known}
    if known != wanted:
        raise ConfigError(
            f"data.features: {folder.path} {_differences(known, wanted)}; make them anew in another folder: "
            "llava-scale precompute CONFIG FOLDER"
        )


def _differences(found: Mapping[MediaKind, Mapping[str, str]], wanted: Mapping[MediaKind, Mapping[str, str]]) -> str:
    if set(found) != set(wanted):
        return f"holds features of {', '.join(found) or 'nothing'}, not of {', '.join(wanted) or 'nothing'}"
    for kind, made in wanted.items():
        for name in {**made, **found[kind]}:
            before, after = found[kind].get(name, "none"), made.get(name, "none")
            if before != after:
                return f"holds features of kind {kind} made with another {name}: {before}, not {after}"
    return "holds other features"


class FeatureWriter:
    """Writes the features of one shard; the file appears whole or not at all.

    Args:
        path: Its final name.
        row_shape: ``(N, D)`` or ``(D,)``.
        dtype: ``float32`` or ``bfloat16``.
    """

    def __init__(self, path: Path, *, row_shape: tuple[int, ...], dtype: str) -> None:
        self._path, self._partial = path, temporary_name(path)
        self._row_shape, self._dtype = row_shape, dtype
        self._starts, self._first = [0], [0]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = self._partial.open("wb")
        self._file.write(bytes(_HEADER))

    def add_sample(self, media: Sequence[Tensor | None]) -> None:
        """Add the rows of each medium of the next sample; None for one that could not be decoded."""
        for rows in media:
            if rows is not None:
                assert tuple(rows.shape[1:]) == self._row_shape, f"{tuple(rows.shape)} is not (R, *{self._row_shape})"
                values = rows.to("cpu", getattr(torch, self._dtype)).contiguous()
                self._file.write(values.view(torch.uint8).numpy().data if values.numel() else b"")
            self._starts.append(self._starts[-1] + (0 if rows is None else len(rows)))
        self._first.append(len(self._starts) - 1)

    def finish(self) -> int:
        """Write what is left and give the file its name; return its bytes."""
        name, width = _TYPES[self._dtype]
        shape = (self._starts[-1], *self._row_shape)
        end = int(np.prod(shape)) * width
        header: dict[str, Any] = {"features": {"dtype": name, "shape": shape, "data_offsets": (0, end)}}
        fill = -end % 8  # offsets lie on whole numbers of their own size
        self._file.write(bytes(fill))
        if fill:
            header["fill"] = {"dtype": "U8", "shape": (fill,), "data_offsets": (end, end + fill)}
            end += fill
        for column, values in (("starts", self._starts), ("first", self._first)):
            data = np.array(values, "<i8").tobytes()
            self._file.write(data)
            header[column] = {"dtype": "I64", "shape": (len(values),), "data_offsets": (end, end + len(data))}
            end += len(data)
        text = json.dumps(header).encode().ljust(_HEADER - 8)
        self._file.seek(0)
        self._file.write((_HEADER - 8).to_bytes(8, "little") + text)
        self._file.flush()
        sync(self._file.fileno())
        self._file.close()
        publish(self._partial, self._path)
        return _HEADER + end

    def discard(self) -> None:
        """Leave no trace of a file that will not be finished; nothing to do after ``finish``."""
        self._file.close()
        self._partial.unlink(missing_ok=True)
