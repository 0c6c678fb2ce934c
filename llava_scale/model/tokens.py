"""Token counts of media, for the data layer: plain numbers, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_scale.compressors import TokenCount
from llava_scale.data.sampling import FrameSampling
from llava_scale.errors import SampleError
from llava_scale.types import Grid, MediaInfo, MediaTokens

if TYPE_CHECKING:
    from llava_scale.towers.audio_base import AudioFrontend


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
    """

    rows: int
    cols: int
    num_tokens: int
    compressor: TokenCount | None = None
    sampling: FrameSampling | None = None
    frontend: AudioFrontend | None = None
    audio_compressor: TokenCount | None = None

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
            return self.visual(number, step=step)
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
            prints.append(f"video:{self.sampling!r}")
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
        if self.audio_compressor is None:
            return MediaTokens(grid=grid, num_tokens=grid[2])
        return MediaTokens(grid=grid, num_tokens=self.audio_compressor.num_tokens(grid, step))
