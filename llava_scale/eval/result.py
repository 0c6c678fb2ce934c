"""What an evaluation found, and its files: ``eval.json`` and ``pictures/``."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from llava_scale.data.files import write_atomic
from llava_scale.data.media import decode_image
from llava_scale.errors import ConfigError, SampleError
from llava_scale.types import EncodedMedium

if TYPE_CHECKING:
    from llava_scale.data.video import VideoTransform
    from llava_scale.eval.likelihood import CaptionRanking
    from llava_scale.eval.metrics import Share
    from llava_scale.types import SkippedSample

FORMAT = 1
"""Version of ``eval.json``; grows when the meaning of a field changes."""

THUMBNAIL = 320
"""Longest side of the pictures kept beside the result, in pixels."""

_FRAMES_IN_ROW, _MAX_FRAMES = 4, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """An answered question to look at.

    Attributes:
        key: Key of the sample.
        task: Its task, or empty.
        modality: As of the question.
        question: Text of the question, without history and placeholders.
        gold: True answer.
        answer: The model's.
        correct: Whether they match.
        pictures: Small JPEGs of the question's pictures, and of the frames of each of its videos.
    """

    key: str
    task: str
    modality: str
    question: str
    gold: str
    answer: str
    correct: bool
    pictures: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Scores of one model on one data set.

    Attributes:
        checkpoint: Name of the model.
        data: Name or path of the data set.
        num_samples: Samples that were used.
        num_questions: Answers that were asked for.
        loss: Nats per supervised token over all samples.
        num_supervised: Supervised tokens.
        exact_match: Per modality, and ``overall``.
        by_task: Exact match per task of the samples.
        blind: Per modality with media: exact match of always giving the most frequent true answer to such questions,
            counted on this very data (see ``metrics.blind_matches``).
        blind_by_task: The same per task.
        blind_model: Per modality with media: exact match of this model with pictures and frames of one colour and
            silent sounds.
        blind_model_by_task: The same per task.
        shuffled_frames: Per modality with videos, where it was asked for: exact match with their frames in another
            order.
        shuffled_frames_by_task: The same per task.
        ranking: Caption ranking, where it was asked for.
        examples: Answers to look at; wrong ones are favoured.
        skipped: Samples that could not be used.
        seconds: Time of each part.
    """

    checkpoint: str
    data: str
    num_samples: int
    num_questions: int
    loss: float | None
    num_supervised: int
    exact_match: dict[str, Share]
    by_task: dict[str, Share]
    blind: dict[str, Share]
    blind_by_task: dict[str, Share]
    blind_model: dict[str, Share]
    blind_model_by_task: dict[str, Share]
    shuffled_frames: dict[str, Share] = field(default_factory=dict)
    shuffled_frames_by_task: dict[str, Share] = field(default_factory=dict)
    ranking: CaptionRanking | None = None
    examples: tuple[Example, ...] = ()
    skipped: tuple[SkippedSample, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Plain numbers by name, as in a run's ``summary.json``."""
        names: dict[str, Any] = {
            "loss": self.loss,
            "exact_match": {group: share.value for group, share in self.exact_match.items()},
            "blind": {group: share.value for group, share in self.blind.items()},
            "blind_model": {group: share.value for group, share in self.blind_model.items()},
        }
        if self.shuffled_frames:
            names["shuffled_frames"] = {group: share.value for group, share in self.shuffled_frames.items()}
        if self.ranking is not None:
            names |= {"ranking_top1": self.ranking.top1.value, "ranking_top5": self.ranking.top5.value}
            names |= {"chance_top1": self.ranking.chance(1), "chance_top5": self.ranking.chance(5)}
        return names

    def to_json(self) -> dict[str, Any]:
        """As written to ``eval.json``; pictures by the names that ``write_result`` gives them."""
        groups = ("exact_match", "blind", "blind_model", "shuffled_frames")
        shares = ("by_task", *groups, *(f"{name}_by_task" for name in groups[1:]))
        plain = ("checkpoint", "data", "num_samples", "num_questions", "loss", "num_supervised")
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in plain},
            **{name: {group: share.to_json() for group, share in getattr(self, name).items()} for name in shares},
            "ranking": None if self.ranking is None else self.ranking.to_json(),
            "examples": [_example(place, example) for place, example in enumerate(self.examples)],
            "skipped": [{"shard": item.shard, "key": item.key, "reason": item.reason} for item in self.skipped],
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }


def write_result(result: EvalResult, folder: str | Path) -> Path:
    """Write ``eval.json`` and ``pictures/`` into ``folder`` and return the path of the JSON.

    Raises:
        ConfigError: the folder cannot be written.
    """
    target = Path(folder) / "eval.json"
    pictures = target.parent / "pictures"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # never beside the pictures of another evaluation
        shutil.rmtree(pictures, ignore_errors=True)
        for place, example in enumerate(result.examples):
            for number, data in enumerate(example.pictures):
                pictures.mkdir(exist_ok=True)
                (target.parent / _picture_name(place, number)).write_bytes(data)
        write_atomic(target, (json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"cannot write into {target.parent}: {error.strerror}; choose another --out") from None
    return target


def thumbnail(data: bytes, *, max_pixels: int) -> bytes:
    """Small JPEG of an encoded picture; empty where it cannot be decoded."""
    try:
        pixels = decode_image(data, max_pixels=max_pixels)
    except SampleError:
        return b""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return _jpeg(picture)


def film_strip(video: bytes | EncodedMedium, transform: VideoTransform) -> bytes:
    """Small JPEG of the frames that the model sees, row by row; empty where they cannot be decoded.

    Args:
        video: A file, or frames stored ahead of time.
        transform: How the model sees it. Of more than 16 frames, 16 are shown, evenly apart.
    """
    known = video if isinstance(video, EncodedMedium) else EncodedMedium(video)
    start_s, end_s = known.clip or (0.0, None)
    try:
        if known.times_s is None:
            frames = transform(known.data, start_s=start_s, end_s=end_s).data
        else:
            frames = transform.stored(known.data, known.times_s).data
    except SampleError:
        return b""
    number = min(len(frames), _MAX_FRAMES)
    shown = [frames[place * len(frames) // number] for place in range(number)]
    side = min(frames.shape[-1], THUMBNAIL // _FRAMES_IN_ROW)
    rows = -(-len(shown) // _FRAMES_IN_ROW)
    strip = Image.new("RGB", (min(len(shown), _FRAMES_IN_ROW) * (side + 2), rows * (side + 2)), "white")
    for place, frame in enumerate(shown):
        row, column = divmod(place, _FRAMES_IN_ROW)
        tile = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((side, side))
        strip.paste(tile, (column * (side + 2) + 1, row * (side + 2) + 1))
    return _jpeg(strip)


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def _example(place: int, example: Example) -> dict[str, Any]:
    names = ("key", "task", "modality", "question", "gold", "answer", "correct")
    pictures = [_picture_name(place, number) for number in range(len(example.pictures))]
    return {**{name: getattr(example, name) for name in names}, "pictures": pictures}


def _picture_name(place: int, number: int) -> str:
    return f"pictures/{place:03d}-{number}.jpg"
