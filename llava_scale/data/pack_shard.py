"""Pack the samples of one shard: read their media, check or prepare them, write tar and index."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_scale.data.files import write_atomic
from llava_scale.data.indexing import probe_media
from llava_scale.data.names import NO_FRAME
from llava_scale.data.opening import index_name
from llava_scale.data.pack_plan import BadRecord, PlannedFile, PlannedSample
from llava_scale.data.prepare import MediaOptions, Prepared, prepare, stored_track, stores_frames
from llava_scale.data.records import AUDIO_CLIPS, FRAME_TIMES, VIDEO_CLIPS, clips_of, wants_sound_tracks
from llava_scale.data.shard_writer import NewMedia, ShardWriter
from llava_scale.errors import SampleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava_scale.types import Clip


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
                loaded = _load_all(sample, task)
            except SampleError as error:
                bad.append(BadRecord(sample.number, sample.key, error.reason))
                continue
            media = [member for item in loaded for member in item.media]
            writer.add(sample.key, encode_record(_record_of(sample, loaded, task.options)), media)
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


def _load_all(sample: PlannedSample, task: ShardTask) -> list[Prepared]:
    """The sample's media; with sound tracks, one that its video does not keep becomes a sound before the others."""
    files = _numbered(sample.files)
    wanted = wants_sound_tracks(sample.record)
    videos = [file for file in sample.files if file.kind == "video"] if wanted else []
    stored = videos if stores_frames(task.options) else []
    counts = Counter(file.kind for file in sample.files)
    clips = clips_of(sample.record, {**counts, "audio": counts["audio"] + len(videos)})
    loaded = []
    for file, number in files:
        is_sound = file.kind == "audio"  # own sounds stand behind the tracks
        clip = clips[file.kind][number + (len(videos) if is_sound else 0)] if file.kind in clips else None
        loaded.append(_load(file, number + (len(stored) if is_sound else 0), task, clip))
    for number, file in enumerate(videos):
        data = (task.media_root / file.path).read_bytes()
        clip = clips["video"][number] if clips else None
        try:
            if stored:
                loaded.append(stored_track(number, data, task.options, clip))
            else:
                probe_media("audio", file.ext, data, clip)
        except SampleError as error:
            raise SampleError(f"sound track of {file.kind} {file.path!r}: {error.reason}") from None
    return loaded


def _load(file: PlannedFile, number: int, task: ShardTask, clip: Clip | None) -> Prepared:
    try:
        data = (task.media_root / file.path).read_bytes()
    except OSError as error:
        raise SampleError(f"{file.kind} {file.path!r} in {task.media_root}: {error.strerror}") from None
    if not data:
        raise SampleError(f"{file.kind} {file.path!r} is empty")
    try:
        return prepare(file.kind, number, data, task.options, clip) or _copied(file, number, data, task.options, clip)
    except SampleError as error:
        raise SampleError(f"{file.kind} {file.path!r}: {error.reason}") from None


def _copied(file: PlannedFile, number: int, data: bytes, options: MediaOptions, clip: Clip | None) -> Prepared:
    info = probe_media(file.kind, file.ext, data, clip)
    if file.kind == "image" and options.verify == "decode":
        from llava_scale.data.media import decode_image

        decode_image(data, max_pixels=options.max_image_pixels)
    return Prepared((NewMedia(file.kind, file.ext, number, NO_FRAME, data, info),))


def _record_of(sample: PlannedSample, loaded: Sequence[Prepared], options: MediaOptions) -> dict[str, Any]:
    """The record, with the times of stored frames per video and without clips that are stored alone."""
    cut = [VIDEO_CLIPS] if stores_frames(options) else []
    cut += [AUDIO_CLIPS] if options.audio_rate else []
    record = {name: value for name, value in sample.record.items() if name not in cut}
    times = [item.times_s for item in loaded if item.media[0].kind == "video"]
    return record | {FRAME_TIMES: times} if any(times) else record
