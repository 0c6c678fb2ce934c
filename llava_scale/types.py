"""The values that cross module borders, with their shapes.

Legend: ``S`` tokens in a row, ``K`` samples in a row, ``F`` frames, ``C`` channels, ``H``/``W`` pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

MediaKind = Literal["image", "video", "audio"]
Role = Literal["system", "user", "assistant"]

MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "video", "audio")
PLACEHOLDERS: dict[MediaKind, str] = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
"""The marker of each kind in the text; matched in order with the media of that kind."""

IGNORE_INDEX = -100
"""Label of a token that is not supervised, as in transformers."""

Clip = tuple[float, "float | None"]
"""First and last second that are used of a video or sound; None is its end."""

Grid = tuple[int, int, int]
"""Tokens of one medium before compression: frames, rows, columns. Sound is ``(1, 1, n)``."""


class Turn(NamedTuple):
    """One message of a conversation; placeholders stand in ``text``."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaInfo:
    """What is known of a medium before it is decoded; enough to count its tokens.

    Attributes:
        kind: Kind of medium.
        width: Pixels; 0 for sound or where unknown.
        height: Pixels; 0 for sound or where unknown.
        num_frames: Frames of a video as stored, 1 for an image, 0 where unknown.
        duration_s: Seconds of a video or sound; 0.0 for an image or where unknown.
        clip: Seconds of the file that are used, where that is not all of it; frames and duration are those of the clip.
            Not kept in indexes: the record tells it.
    """

    kind: MediaKind
    width: int = 0
    height: int = 0
    num_frames: int = 0
    duration_s: float = 0.0
    clip: Clip | None = None


class TokenPart(NamedTuple):
    """A stretch of a medium's tokens, with what stands before it in the text.

    Attributes:
        time_s: When it begins in the video or sound.
        num_tokens: Tokens of the medium.
        before: Token ids of text, such as a time stamp.
    """

    time_s: float
    num_tokens: int
    before: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaTokens:
    """How many tokens a medium takes in the text, and the grid they come from.

    Attributes:
        grid: Before compression.
        num_tokens: Tokens of the medium itself.
        parts: The same in stretches, where text stands between them or they take turns with another medium; empty for
            one stretch without text.
    """

    grid: Grid
    num_tokens: int
    parts: tuple[TokenPart, ...] = ()

    @property
    def num_positions(self) -> int:
        """Positions in the text: tokens of the medium and of the text between them."""
        return self.num_tokens + sum(len(part.before) for part in self.parts)


class MediaTokenCounter(Protocol):
    """Promise of the model to the data layer: token counts without running anything.

    Implementations are pickled into loader workers, so they hold no weights.
    """

    def count(self, info: MediaInfo, *, step: int | None) -> MediaTokens:
        """Tokens of one medium at optimizer step ``step``; ``None`` means evaluation (final ratio)."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever any count could change."""
        ...


@dataclass(frozen=True, slots=True)
class Media:
    """A decoded medium.

    Attributes:
        kind: Kind of medium.
        data: image uint8 ``(3, H, W)``; video uint8 ``(F, 3, H, W)``; audio float32 ``(N,)`` in [-1, 1].
        times_s: Video only: presentation time of each frame in seconds.
    """

    kind: MediaKind
    data: Tensor
    times_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class EncodedMedium:
    """An encoded medium with what its sample says of it.

    Attributes:
        data: The whole file; of a video stored as pictures all of them (``data.records.join_frames``).
        times_s: When each stored picture is shown, empty where that is not known; None for a file.
        clip: Seconds of the file that are used; None for all.
    """

    data: bytes
    times_s: tuple[float, ...] | None = None
    clip: Clip | None = None


@dataclass(frozen=True, slots=True)
class AudioFeatures:
    """Windows of one or several sounds, ready for a tower.

    Attributes:
        values: float32 ``(W, ...)``; the second dimension is time and may be padded behind a window's end.
        lengths: int64 ``(W,)``: samples of sound in each window, filled-up silence included.
    """

    values: Tensor
    lengths: Tensor

    @classmethod
    def joined(cls, sounds: Sequence[AudioFeatures]) -> AudioFeatures:
        """Windows of several sounds as one batch, in order; shorter windows are padded with zeros at their end."""
        import torch

        return cls(
            stacked_windows([window for sound in sounds for window in sound.values]),
            torch.cat([sound.lengths for sound in sounds]),
        )


def stacked_windows(windows: Sequence[Tensor]) -> Tensor:
    """Windows ``(T, ...)`` as one tensor ``(W, T, ...)``, the shorter ones padded with zeros at their end."""
    import torch

    longest = max(len(window) for window in windows)
    if all(len(window) == longest for window in windows):
        return torch.stack(list(windows))
    stacked = windows[0].new_zeros(len(windows), longest, *windows[0].shape[1:])
    for row, window in zip(stacked, windows, strict=True):
        row[: len(window)] = window
    return stacked


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One conversation with its media still encoded, as read from a shard.

    Attributes:
        key: Key of the sample, unescaped.
        shard: Shard (or file) that it came from, for messages.
        turns: The conversation, in order.
        media: Per kind the encoded files, in order: (extension without dot, bytes).
        extra: Every other field of the sample's json (``id`` and ``conversations`` left out).
    """

    key: str
    shard: str
    turns: tuple[Turn, ...]
    media: dict[MediaKind, tuple[tuple[str, bytes], ...]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedSample:
    """A sample that could not be used: where it lies and why."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """Whole samples laid end to end: one micro-batch.

    Attributes:
        input_ids: ``(S,)`` int64; a medium's positions hold its placeholder's token id.
        labels: ``(S,)`` int64; ``IGNORE_INDEX`` where unsupervised, aligned with ``input_ids`` (not shifted).
        position_ids: ``(S,)`` int64, restarting at 0 with each sample.
        cu_seq_lens: ``(K + 1,)`` int32 offsets of the samples.
        pixel_values: ``(I, 3, H, W)`` uint8 pictures in order of appearance, or None.
        image_grids: One grid a picture.
        image_num_tokens: Tokens each picture takes in ``input_ids``.
        pixel_values_videos: ``(F, 3, H, W)`` uint8 frames of all videos in order, or None.
        video_grids: One grid a video; their first entries sum to ``F``.
        video_num_tokens: Tokens each video takes in ``input_ids``.
        audio_values: Features of all windows of all sounds in order (made by the audio tower's front end), padded
            with zeros to the longest, or None.
        audio_lengths: ``(W,)`` int64 samples in each window; None without sounds.
        audio_grids: One grid a sound.
        audio_num_tokens: Tokens each sound takes in ``input_ids``.
        image_features: ``(I, N, D)`` of a frozen tower, computed ahead, instead of ``pixel_values``; or None.
        video_features: ``(F, N, D)``, the same of all frames.
        audio_features: ``(sum of features, D)``, the same of all sounds.
        instructions: For each picture, then each video, then each sound: the human turns of its sample without
            placeholders.
        keys: Keys of the samples, in order.
        skipped: Samples that were planned into this row and could not be used.
        step: Optimizer step that the counts were made for; None at evaluation.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seq_lens: Tensor
    pixel_values: Tensor | None = None
    image_grids: tuple[Grid, ...] = ()
    image_num_tokens: tuple[int, ...] = ()
    pixel_values_videos: Tensor | None = None
    video_grids: tuple[Grid, ...] = ()
    video_num_tokens: tuple[int, ...] = ()
    audio_values: Tensor | None = None
    audio_lengths: Tensor | None = None
    audio_grids: tuple[Grid, ...] = ()
    audio_num_tokens: tuple[int, ...] = ()
    image_features: Tensor | None = None
    video_features: Tensor | None = None
    audio_features: Tensor | None = None
    instructions: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    skipped: tuple[SkippedSample, ...] = ()
    step: int | None = None

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens: the row's share of the loss denominator.

        The first token of a sample has no predecessor inside its sample and never counts.
        """
        supervised = self.labels != IGNORE_INDEX
        supervised[self.cu_seq_lens[:-1].long()] = False
        return int(supervised.sum())

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that pictures and videos take in the row."""
        return sum(self.image_num_tokens) + sum(self.video_num_tokens)

    @property
    def num_visual_features(self) -> int:
        """Tokens that pictures and videos had before compression."""
        return sum(prod(grid) for grid in (*self.image_grids, *self.video_grids))

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> PackedRow:
        """Return the row with its tensors on ``device``."""
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if hasattr(value, "to") and hasattr(value, "dtype"):
                moved[item.name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)

    def pin_memory(self) -> PackedRow:
        """Return the row in page-locked memory, for asynchronous copies to a device."""
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if hasattr(value, "pin_memory"):
                moved[item.name] = value.pin_memory()
        return replace(self, **moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """The rows that one rank works on in one optimizer step: its micro-batches, in order."""

    step: int
    rows: tuple[PackedRow, ...]
