"""Token counts of media, for the data layer: plain numbers, no weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_scale.compressors import TokenCount
from llava_scale.config.compressor import PixelShuffleConfig, PoolConfig, QFormerConfig, StcConfig, TomeConfig
from llava_scale.data.expansion import SOUND_CHUNK_S
from llava_scale.data.sampling import FrameSampling, middles
from llava_scale.errors import ConfigError, SampleError
from llava_scale.types import Grid, MediaInfo, MediaTokens, TokenPart

if TYPE_CHECKING:
    from llava_scale.config import CompressorConfig
    from llava_scale.towers.audio_base import AudioFrontend


@dataclass(frozen=True, slots=True)
class TimeStamps:
    """Times as token ids, without a tokenizer: each digit is tokenised alone, so that every count is known.

    Attributes:
        opening: Ids of ``<``.
        digits: Ids of each digit.
        point: Ids of the decimal point.
        closing: Ids of `` seconds>``.
    """

    opening: tuple[int, ...]
    digits: tuple[tuple[int, ...], ...]
    point: tuple[int, ...]
    closing: tuple[int, ...]

    @classmethod
    def of(cls, encode: Callable[[str], list[int]]) -> TimeStamps:
        """Made by a tokenizer that gives the ids of a text inside of another one."""
        opening, point, closing = (tuple(encode(text)) for text in ("<", ".", " seconds>"))
        return cls(opening, tuple(tuple(encode(str(digit))) for digit in range(10)), point, closing)

    def ids(self, time_s: float) -> tuple[int, ...]:
        """``<12.5 seconds>``."""
        whole, tenth = divmod(round(time_s * 10), 10)
        before = [token for digit in str(whole) for token in self.digits[int(digit)]]
        return (*self.opening, *before, *self.point, *self.digits[tenth], *self.closing)


def check_sound_order(section: CompressorConfig | None) -> None:
    """Refuse to interleave sounds whose tokens are not spread evenly over time.

    Raises:
        ConfigError: ``section`` compresses them so.
    """
    if section is not None and not isinstance(section, PoolConfig):
        raise ConfigError(
            f"model.video.sound_order=interleave needs sound tokens that are spread evenly over time, which those of "
            f"model.audio_compressor {section.type!r} are not; choose none or pool"
        )


def frames_per_slot(section: CompressorConfig | None) -> int:
    """Frames behind each group of consecutive tokens that ``section`` leaves of a video.

    Raises:
        ConfigError: its tokens do not belong to certain frames.
    """
    if section is None or isinstance(section, TomeConfig | PixelShuffleConfig):
        return 1
    if isinstance(section, PoolConfig | StcConfig):
        return section.window[0]
    if isinstance(section, QFormerConfig) and section.scope == "frame":
        return 1
    raise ConfigError(
        f"model.video.timestamps and sound_order=interleave need tokens that belong to certain frames, which those of "
        f"model.compressor {section.type!r} do not; choose none, pool, stc, tome, pixel_shuffle, or qformer by frame"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaCounter:
    """Tokens of pictures, videos and sounds at any step.

    Every picture and every frame is resized to one size, so each has the same number of features.

    Attributes:
        rows: Rows of the vision tower's grid.
        cols: Columns of the vision tower's grid.
        num_tokens: Features of one picture.
        compressor: How many tokens become of pictures and videos in the text; None where all stay.
        sampling: How frames of videos are chosen; None for a model that takes no videos.
        frontend: What makes features of sounds; None for a model that takes none.
        audio_compressor: How many tokens become of a sound; None where all stay.
        stamps: Times as token ids, where they stand before the frames of videos; else None.
        interleave: Whether sounds take turns with the frames of the video before them.
        slot: Frames behind each group of tokens, where either is asked for.
    """

    rows: int
    cols: int
    num_tokens: int
    compressor: TokenCount | None = None
    sampling: FrameSampling | None = None
    frontend: AudioFrontend | None = None
    audio_compressor: TokenCount | None = None
    stamps: TimeStamps | None = None
    interleave: bool = False
    slot: int = 1

    def count(self, info: MediaInfo, *, step: int | None) -> MediaTokens:
        """Tokens of one medium at optimizer step ``step`` (None: evaluation).

        Raises:
            SampleError: a kind that the model does not take, a video whose frames cannot be counted, or a sound
                without length.
        """
        if info.kind == "image":
            return self.visual(1, step=step)
        if info.kind == "video" and self.sampling is not None:
            number = self.sampling.num_sampled(num_frames=info.num_frames, duration_s=info.duration_s)
            return self._with_frame_times(self.visual(number, step=step), info.duration_s)
        if info.kind == "audio" and self.frontend is not None:
            if info.duration_s <= 0:
                raise SampleError("the duration of the sound is unknown; index the shard again")
            return self.sound(self.frontend.num_samples(info.duration_s), step=step)
        taken = ["text", "images", *(["videos"] if self.sampling else []), *(["sounds"] if self.frontend else [])]
        remedy = "set model.audio_tower, or leave it out" if info.kind == "audio" else "leave it out"
        raise SampleError(f"this model reads {', '.join(taken)}, but the sample holds {info.kind}; {remedy}")

    def fingerprint(self) -> str:
        """Changes whenever any count could change."""
        compressed = "" if self.compressor is None else f":{self.compressor!r}"
        prints = [f"image:{self.rows}x{self.cols}:{self.num_tokens}{compressed}"]
        if self.sampling is not None:
            prints.append(f"video:{self.sampling!r}:{self.stamps!r}:{self.interleave}:{self.slot}")
        if self.frontend is not None:
            prints.append(f"audio:{self.frontend.fingerprint()}:{self.audio_compressor!r}")
        return " ".join(prints)

    def visual(self, num_frames: int, *, step: int | None) -> MediaTokens:
        """Tokens of a picture, or of a video of ``num_frames`` chosen frames."""
        grid: Grid = (num_frames, self.rows, self.cols)
        if self.compressor is None:
            return MediaTokens(grid=grid, num_tokens=num_frames * self.num_tokens)
        return MediaTokens(grid=grid, num_tokens=self.compressor.num_tokens(grid, step))

    def sound(self, num_samples: int, *, step: int | None) -> MediaTokens:
        """Tokens of a sound of ``num_samples`` samples, in a model that hears.

        Raises:
            SampleError: a sound without samples.
        """
        assert self.frontend is not None
        grid: Grid = (1, 1, self.frontend.num_tokens(num_samples))
        number = grid[2] if self.audio_compressor is None else self.audio_compressor.num_tokens(grid, step)
        parts = _chunks(number, num_samples / self.frontend.sample_rate) if self.interleave else ()
        return MediaTokens(grid=grid, num_tokens=number, parts=parts)

    def _with_frame_times(self, counted: MediaTokens, duration_s: float) -> MediaTokens:
        """The tokens of a video in groups that belong together, each with its time.

        Raises:
            SampleError: the times are needed and the duration is unknown.
        """
        if self.stamps is None and not self.interleave:
            return counted
        if duration_s <= 0:
            raise SampleError(
                "the duration of the video is unknown, so its frames have no times; index the shard again"
            )
        frames = counted.grid[0]
        times = middles(0.0, duration_s, frames)[:: self.slot]
        each = counted.num_tokens // len(times)
        parts = tuple(TokenPart(time, each, self.stamps.ids(time) if self.stamps else ()) for time in times)
        return MediaTokens(grid=counted.grid, num_tokens=counted.num_tokens, parts=parts)


def _chunks(num_tokens: int, duration_s: float) -> tuple[TokenPart, ...]:
    """Tokens that are spread evenly over a sound, in chunks of it."""
    num_chunks = max(1, math.ceil(duration_s / SOUND_CHUNK_S))
    ends = [round(num_tokens * min(1.0, (chunk + 1) * SOUND_CHUNK_S / duration_s)) for chunk in range(num_chunks)]
    starts = [0, *ends[:-1]]
    return tuple(
        TokenPart(chunk * SOUND_CHUNK_S, end - start)
        for chunk, (start, end) in enumerate(zip(starts, ends, strict=True))
    )
