"""Pack the samples of one shard: read their media, check or prepare them, write tar and index."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llava_scale.data.files import write_atomic
from llava_scale.data.indexing import probe_media
from llava_scale.data.names import NO_FRAME
from llava_scale.data.opening import index_name
from llava_scale.data.pack_plan import BadRecord, PlannedFile, PlannedSample
from llava_scale.data.shard_writer import NewMedia, ShardWriter
from llava_scale.errors import ConfigError, SampleError
from llava_scale.types import MediaInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava_scale.data.media import ImageTransform


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaOptions:
    """What happens to media on their way into a shard.

    Attributes:
        image_size: Store pictures as square JPEGs with this side; 0 copies files byte for byte.
        image_aspect: ``pad`` keeps the whole picture on a background, ``resize`` stretches it.
        image_quality: JPEG quality of prepared pictures, 1 to 100.
        image_background: RGB colour of the padding.
        verify: ``decode`` decodes every picture that is copied, ``header`` trusts it when its header can be read.
        max_image_pixels: Larger pictures are bad records.
    """

    image_size: int = 0
    image_aspect: Literal["pad", "resize"] = "pad"
    image_quality: int = 92
    image_background: tuple[int, int, int] = (127, 127, 127)
    verify: Literal["decode", "header"] = "decode"
    max_image_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        if self.image_size < 0:
            raise ConfigError(f"image size must be at least 1, or 0 for faithful copies; got {self.image_size}")
        if not 1 <= self.image_quality <= 100:
            raise ConfigError(f"image quality must be in 1 to 100, got {self.image_quality}")

    def prepared(self) -> dict[str, Any]:
        """Return what ``dataset.json`` says of prepared media; empty where they are copies."""
        if not self.image_size:
            return {}
        values = asdict(self)
        return {name: values[name] for name in ("image_size", "image_aspect", "image_quality", "image_background")}


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to write: picklable, so that any process or machine can do it.

    Attributes:
        path: The tar.
        report: Where bad records go; present only while the shard has some.
        samples: Its samples, in order.
        media_root: Folder of the media.
        options: What happens to them.
    """

    path: Path
    report: Path
    samples: tuple[PlannedSample, ...]
    media_root: Path
    options: MediaOptions


def pack_shard(task: ShardTask) -> int:
    """Write one shard and its index; return how many samples it holds.

    Bad samples are left out and listed in ``task.report``, before the shard appears. Without good ones there is none.
    """
    bad: list[BadRecord] = []
    with ShardWriter(task.path) as writer:
        for sample in task.samples:
            try:
                media = [_load(file, number, task) for file, number in _numbered(sample.files)]
            except SampleError as error:
                bad.append(BadRecord(sample.number, sample.key, error.reason))
                continue
            writer.add(sample.key, encode_record(sample.record), media)
        if bad:
            write_atomic(task.report, json.dumps([asdict(item) for item in bad]).encode())
        if writer.num_samples:
            writer.finish()
        else:
            task.path.with_name(index_name(task.path.name)).unlink(missing_ok=True)
            task.path.unlink(missing_ok=True)
        if not bad:
            task.report.unlink(missing_ok=True)
        return writer.num_samples


def read_bad(report: Path) -> list[BadRecord]:
    """Return the bad records of a shard."""
    try:
        return [BadRecord(**item) for item in json.loads(report.read_bytes())]
    except FileNotFoundError:
        return []


def encode_record(record: dict[str, Any]) -> bytes:
    """Return a sample's record as stored: compact UTF-8 JSON."""
    try:
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair in a field that is no conversation
        return json.dumps(record, separators=(",", ":")).encode()


def _numbered(files: Sequence[PlannedFile]) -> list[tuple[PlannedFile, int]]:
    seen: dict[str, int] = {}
    numbered = []
    for file in files:
        numbered.append((file, seen.get(file.kind, 0)))
        seen[file.kind] = seen.get(file.kind, 0) + 1
    return numbered


def _load(file: PlannedFile, number: int, task: ShardTask) -> NewMedia:
    try:
        data = (task.media_root / file.path).read_bytes()
    except OSError as error:
        raise SampleError(f"{file.kind} {file.path!r} in {task.media_root}: {error.strerror}") from None
    if not data:
        raise SampleError(f"{file.kind} {file.path!r} is empty")
    try:
        return _prepare(file, number, data, task.options)
    except SampleError as error:
        raise SampleError(f"{file.kind} {file.path!r}: {error.reason}") from None


def _prepare(file: PlannedFile, number: int, data: bytes, options: MediaOptions) -> NewMedia:
    if file.kind == "image" and options.image_size:
        side = options.image_size
        info = MediaInfo(kind="image", width=side, height=side, num_frames=1)
        return NewMedia("image", "jpg", number, NO_FRAME, _prepared_jpeg(data, options), info)
    info = probe_media(file.kind, file.ext, data)
    if file.kind == "image" and options.verify == "decode":
        from llava_scale.data.media import decode_image

        decode_image(data, max_pixels=options.max_image_pixels)
    return NewMedia(file.kind, file.ext, number, NO_FRAME, data, info)


def _prepared_jpeg(data: bytes, options: MediaOptions) -> bytes:
    from PIL import Image

    pixels = _transform(options)(data).permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=options.image_quality)
    return buffer.getvalue()


@lru_cache(maxsize=4)
def _transform(options: MediaOptions) -> ImageTransform:
    from llava_scale.data.media import ImageTransform

    return ImageTransform(
        size=options.image_size,
        aspect=options.image_aspect,
        background=options.image_background,
        max_pixels=options.max_image_pixels,
    )
