"""From the plan of a row to the row: read, tokenise, decode, expand placeholders, lay end to end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llava_scale.data.decoding import OtherMedia, decode_others, different_shapes, joined_frames
from llava_scale.data.expansion import with_media
from llava_scale.data.features import join_rows
from llava_scale.data.lengths import UNREADABLE
from llava_scale.data.memory import empty
from llava_scale.errors import SampleError, ShapeError, ShardError
from llava_scale.types import (
    IGNORE_INDEX,
    MEDIA_KINDS,
    PLACEHOLDERS,
    AudioFeatures,
    Grid,
    MediaKind,
    PackedRow,
    SkippedSample,
)

if TYPE_CHECKING:
    from llava_scale.data.chat import ChatEncoder
    from llava_scale.data.dataset import ShardedDataset
    from llava_scale.data.features import FeatureFolder, Rows
    from llava_scale.data.planner import PlannedSample, RowPlan
    from llava_scale.types import MediaInfo, MediaTokenCounter, MediaTokens, Sample, Turn

IntArray = NDArray[np.int64]
MediaTransform = Callable[..., Any]
"""Encoded file to what the model takes.

Pictures: ``transform(data)`` is uint8 ``(3, H, W)``; one that has an attribute ``shape`` also takes a tensor of that
shape to write into. Videos and sounds: as in ``data.decoding``.
"""

_PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))
_ALIGNMENT_TOKENS = 2  # of a row without samples; one would leave nothing to predict


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one planned sample."""

    source: int
    skipped: SkippedSample | None = None
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class BuiltRow:
    """A row and, in the order of its plan, what became of each sample (rejected ones first)."""

    row: PackedRow
    outcomes: tuple[Outcome, ...]

    def pin_memory(self) -> BuiltRow:
        """The same with the row in page-locked memory."""
        return BuiltRow(self.row.pin_memory(), self.outcomes)


@dataclass(slots=True)
class PreparedSample:
    """A sample ready to be laid into a row: ``L`` tokens, media expanded; its pictures lie in the row's block."""

    key: str
    input_ids: IntArray
    labels: IntArray
    instruction: str
    media: OtherMedia
    tokens: dict[MediaKind, list[MediaTokens]]
    truncated: bool = False


@dataclass(frozen=True, kw_only=True)
class RowBuilder:
    """Builds rows from their plans; holds nothing that changes, so any worker builds the same row.

    Attributes:
        datasets: The data sets that plans refer to by number.
        encoder: Conversation -> token ids.
        counter: Tokens of each medium.
        transforms: Per kind the way from encoded bytes to a tensor; a kind without one is an error of the sample.
        row_length: Most tokens of one sample.
        truncate: Whether the text of longer samples is cut at its end.
        features: Tower features computed ahead; media of the kinds that it holds are not decoded.
    """

    datasets: Sequence[ShardedDataset]
    encoder: ChatEncoder
    counter: MediaTokenCounter
    transforms: Mapping[MediaKind, MediaTransform]
    row_length: int
    truncate: bool = False
    features: FeatureFolder | None = None

    def build(self, plan: RowPlan) -> BuiltRow:
        """Build one row; samples that cannot be used are left out and reported.

        Raises:
            ShardError: if a shard cannot be read, or differs from what was planned on.
        """
        samples: list[PreparedSample] = []
        outcomes: list[Outcome] = []
        members = (*plan.rejected, *plan.samples)
        infos = [self.datasets[planned.source].media_infos(planned.number) for planned in members]
        pictures = PictureBlock(sum(info.kind == "image" for of_sample in infos for info in of_sample))
        for planned, of_sample, found in zip(members, infos, self._read(members), strict=True):
            num_pictures = pictures.size
            try:
                sample = self.prepare(planned, found, of_sample, plan.step, pictures)
            except SampleError as error:
                pictures.size = num_pictures
                outcomes.append(Outcome(planned.source, self._skipped(planned, error)))
                continue
            samples.append(sample)
            outcomes.append(Outcome(planned.source, truncated=sample.truncated))
        skipped = tuple(outcome.skipped for outcome in outcomes if outcome.skipped is not None)
        return BuiltRow(lay_out(samples, pictures.tensor(), step=plan.step, skipped=skipped), tuple(outcomes))

    def prefetch(self, plan: RowPlan) -> None:
        """Start fetching what the row needs, if it lies on another machine."""
        for source, numbers in _by_source((*plan.rejected, *plan.samples)).items():
            self.datasets[source].prefetch(numbers)

    def prepare(
        self,
        planned: PlannedSample,
        sample: Sample | SampleError,
        infos: Sequence[MediaInfo],
        step: int | None,
        pictures: PictureBlock,
    ) -> PreparedSample:
        """Tokenise the text of one sample as read, and decode its media; its pictures go to ``pictures``.

        Raises:
            SampleError: if it cannot be used, with the reason.
        """
        if isinstance(sample, SampleError):
            raise sample
        encoded = self.encoder.encode(sample.turns)
        ids = np.asarray(encoded.input_ids, dtype=np.int64)
        labels = np.full(len(ids), IGNORE_INDEX)
        for start, stop in encoded.answers:
            labels[start:stop] = ids[start:stop]
        places, tokens = self._expansion(sample, ids, infos, step)
        self._check_plan(planned, sample, len(ids) - len(places))
        behind = len(ids) - places[-1] - 1 if places else len(ids)  # text behind the last medium
        if places:
            ids, labels = with_media(ids, labels, places, tokens, self.encoder.placeholder_ids)
        truncated = len(ids) > self.row_length
        if truncated:
            ids, labels = self._cut(sample, ids, labels, len(ids) - behind)
        if not (labels[1:] != IGNORE_INDEX).any():
            raise _error(sample, "no supervised token; give it an answer")
        by_kind: dict[MediaKind, list[MediaTokens]] = {}
        for kind, counted in tokens:
            by_kind.setdefault(kind, []).append(counted)
        media = self._decode(planned, sample, infos, pictures)
        return PreparedSample(sample.key, ids, labels, instruction_of(sample.turns), media, by_kind, truncated)

    def _read(self, members: Sequence[PlannedSample]) -> Iterator[Sample | SampleError]:
        """Yield samples in their order, those of one data set fetched together."""
        read = {source: iter(self.datasets[source].samples(numbers)) for source, numbers in _by_source(members).items()}
        return (next(read[planned.source]) for planned in members)

    def _expansion(
        self, sample: Sample, ids: IntArray, infos: Sequence[MediaInfo], step: int | None
    ) -> tuple[list[int], list[tuple[MediaKind, MediaTokens]]]:
        """Places of the placeholders in ``ids``, in order, and kind and tokens of the medium behind each."""
        markers: list[tuple[int, MediaInfo]] = []
        for kind, marker in self.encoder.placeholder_ids.items():
            of_kind = [info for info in infos if info.kind == kind]
            found: list[int] = (ids == marker).nonzero()[0].tolist()
            if len(found) != len(of_kind):
                count = f"{len(found)} placeholder tokens for {len(of_kind)} media of kind {kind}"
                raise _error(sample, f"its text has {count}")
            markers += zip(found, of_kind, strict=True)
        markers.sort(key=lambda marker: marker[0])
        for _, info in markers:
            self._transform(sample, info.kind)
        tokens = [(info.kind, self.counter.count(info, step=step)) for _, info in markers]
        return [place for place, _ in markers], tokens

    def _decode(
        self, planned: PlannedSample, sample: Sample, infos: Sequence[MediaInfo], pictures: PictureBlock
    ) -> OtherMedia:
        """Videos and sounds of a sample, and what is stored of its media; pictures are added to ``pictures``."""
        stored = {} if self.features is None else self.features.read(self.datasets[planned.source], planned.number)
        missing = any(not len(rows) for media in stored.values() for rows in media)
        leave = () if missing else stored  # what could not be decoded then is decoded now, for its error
        files = () if "image" in leave else sample.media.get("image", ())
        try:
            for _, data in files:
                pictures.add(self.transforms["image"], data)
            if len(files) == len(infos) and not stored:
                return OtherMedia()
            media = decode_others(sample, infos, self.transforms, leave)
        except SampleError as error:
            raise error.at(shard=sample.shard, key=sample.key) from error
        if missing:
            raise ShardError(
                f"{sample.shard}: sample {sample.key!r} could not be read when features were computed, but can now; "
                "delete the features of this shard and run llava-scale precompute again"
            )
        return replace(media, stored=stored)

    def _transform(self, sample: Sample, kind: MediaKind) -> MediaTransform:
        if kind not in self.transforms:
            raise _error(sample, f"the model takes no {kind}; configure a tower for it or leave such samples out")
        return self.transforms[kind]

    def _cut(self, sample: Sample, ids: IntArray, labels: IntArray, last_medium: int) -> tuple[IntArray, IntArray]:
        """Shorten the text to the row; ``last_medium`` is the end of the last medium's tokens."""
        limit = self.row_length
        too_long = f"{len(ids)} tokens do not fit in a row of {limit} (data.packing.row_length)"
        if not self.truncate:
            raise _error(sample, f"{too_long}; raise it, or set data.truncate=text")
        if last_medium > limit:
            raise _error(sample, f"{too_long} and cutting its text would cut media tokens; raise the row's length")
        if not (labels[1:limit] != IGNORE_INDEX).any():
            raise _error(sample, f"{too_long} and cutting its text would leave no supervised token")
        return ids[:limit], labels[:limit]

    def _check_plan(self, planned: PlannedSample, sample: Sample, text_length: int) -> None:
        """Planned and real lengths differ only if files changed under a running or resumed stream."""
        if planned.text_length == UNREADABLE or planned.text_length not in (0, text_length):
            raise ShardError(
                f"{sample.shard}: sample {sample.key!r} was planned with {planned.text_length} text tokens and has "
                f"{text_length}: the shard changed after it was indexed; run: llava-scale data index FOLDER"
            )

    def _skipped(self, planned: PlannedSample, error: SampleError) -> SkippedSample:
        dataset = self.datasets[planned.source]
        shard = error.shard or dataset.shard_name(dataset.locate(planned.number)[0])
        return SkippedSample(shard=shard, key=error.key or dataset.key(planned.number), reason=error.reason)


class PictureBlock:
    """The pictures of a row in one block of memory, channels last as transforms leave them.

    Each picture is copied while it is still in the processor's cache, and none is held twice.

    Args:
        capacity: Most pictures that will be added.

    Attributes:
        size: Pictures held; lowering it drops the last ones.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._block: Tensor | None = None
        self.size = 0

    def add(self, transform: MediaTransform, data: bytes) -> None:
        """Make a picture of an encoded file, in the next place.

        Raises:
            SampleError: from ``transform``.
            ShapeError: if it differs in shape from those before it.
        """
        shape: tuple[int, int, int] | None = getattr(transform, "shape", None)
        if shape is not None and (self._block is None or self._block.shape[1:] == shape):
            transform(data, self._place(shape, torch.uint8))
        else:
            picture = transform(data)
            self._place(tuple(picture.shape), picture.dtype).copy_(picture)
        self.size += 1

    def _place(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._block is None:
            channels, height, width = shape
            self._block = empty((self._capacity, height, width, channels), dtype).permute(0, 3, 1, 2)
        if self._block.shape[1:] != shape:
            raise ShapeError(different_shapes("pictures", [tuple(self._block.shape[1:]), tuple(shape)]))
        return self._block[self.size]

    def tensor(self) -> Tensor | None:
        """All pictures, ``(I, 3, H, W)``; None without any."""
        return self._block[: self.size] if self._block is not None and self.size else None


def lay_out(
    samples: Sequence[PreparedSample],
    pictures: Tensor | None,
    *,
    step: int | None,
    skipped: tuple[SkippedSample, ...] = (),
) -> PackedRow:
    """Lay samples end to end; none at all give a row of two unsupervised tokens that keeps ranks aligned."""
    if not samples:
        return _alignment_row(step, skipped)
    lengths = np.array([len(sample.input_ids) for sample in samples])
    ends = np.cumsum(lengths)
    media = _Collected()
    for sample in samples:
        media.add(sample)
    sounds = AudioFeatures.joined(media.sounds) if media.sounds else None
    return PackedRow(
        input_ids=torch.from_numpy(np.concatenate([sample.input_ids for sample in samples])),
        labels=torch.from_numpy(np.concatenate([sample.labels for sample in samples])),
        position_ids=torch.from_numpy(np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)),
        cu_seq_lens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        pixel_values=pictures,
        image_grids=media.grids("image"),
        image_num_tokens=media.num_tokens("image"),
        pixel_values_videos=joined_frames(media.frames),
        video_grids=media.grids("video"),
        video_num_tokens=media.num_tokens("video"),
        audio_values=sounds.values if sounds else None,
        audio_lengths=sounds.lengths if sounds else None,
        audio_grids=media.grids("audio"),
        audio_num_tokens=media.num_tokens("audio"),
        image_features=join_rows(media.stored["image"]),
        video_features=join_rows(media.stored["video"]),
        audio_features=join_rows(media.stored["audio"]),
        instructions=media.instructions(),
        keys=tuple(sample.key for sample in samples),
        skipped=skipped,
        step=step,
    )


def instruction_of(turns: Sequence[Turn]) -> str:
    """The human turns without placeholders, one a line."""
    texts = (_PLACEHOLDER.sub("", turn.text).strip() for turn in turns if turn.role == "user")
    return "\n".join(text for text in texts if text)


@dataclass(slots=True)
class _Collected:
    """The media of a row, per kind in order."""

    frames: list[Tensor] = field(default_factory=list)
    sounds: list[AudioFeatures] = field(default_factory=list)
    stored: dict[MediaKind, list[Rows]] = field(default_factory=lambda: {kind: [] for kind in MEDIA_KINDS})
    tokens: dict[MediaKind, list[MediaTokens]] = field(default_factory=lambda: {kind: [] for kind in MEDIA_KINDS})
    questions: dict[MediaKind, list[str]] = field(default_factory=lambda: {kind: [] for kind in MEDIA_KINDS})

    def add(self, sample: PreparedSample) -> None:
        self.frames += sample.media.frames
        self.sounds += sample.media.sounds
        for kind, rows in sample.media.stored.items():
            self.stored[kind] += rows
        for kind, tokens in sample.tokens.items():
            self.tokens[kind] += tokens
            self.questions[kind] += [sample.instruction] * len(tokens)

    def grids(self, kind: MediaKind) -> tuple[Grid, ...]:
        return tuple(counted.grid for counted in self.tokens[kind])

    def instructions(self) -> tuple[str, ...]:
        return tuple(question for kind in MEDIA_KINDS for question in self.questions[kind])

    def num_tokens(self, kind: MediaKind) -> tuple[int, ...]:
        return tuple(counted.num_tokens for counted in self.tokens[kind])


def _by_source(members: Sequence[PlannedSample]) -> dict[int, list[int]]:
    numbers: dict[int, list[int]] = {}
    for planned in members:
        numbers.setdefault(planned.source, []).append(planned.number)
    return numbers


def _alignment_row(step: int | None, skipped: tuple[SkippedSample, ...]) -> PackedRow:
    return PackedRow(
        input_ids=torch.zeros(_ALIGNMENT_TOKENS, dtype=torch.int64),
        labels=torch.full((_ALIGNMENT_TOKENS,), IGNORE_INDEX, dtype=torch.int64),
        position_ids=torch.arange(_ALIGNMENT_TOKENS),
        cu_seq_lens=torch.tensor([0, _ALIGNMENT_TOKENS], dtype=torch.int32),
        skipped=skipped,
        step=step,
    )


def _error(sample: Sample, reason: str) -> SampleError:
    return SampleError(reason, shard=sample.shard, key=sample.key)
