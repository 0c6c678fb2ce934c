"""Token counts of media, for the data layer: plain numbers, no weights."""

from __future__ import annotations

from dataclasses import dataclass

from llava_scale.errors import SampleError
from llava_scale.types import MediaInfo, MediaTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTokenCounter:
    """Every picture is resized to one size, so each takes the same number of tokens.

    Attributes:
        rows: Rows of the tower's grid.
        cols: Columns of the tower's grid.
        num_tokens: Tokens of one picture in the text.
    """

    rows: int
    cols: int
    num_tokens: int

    def count(self, info: MediaInfo, *, step: int | None) -> MediaTokens:
        """Tokens of one picture; the same at every optimizer step.

        Raises:
            SampleError: the medium is not a picture.
        """
        if info.kind != "image":
            raise SampleError(f"this model reads images and text, but the sample holds {info.kind}; leave it out")
        return MediaTokens(grid=(1, self.rows, self.cols), num_tokens=self.num_tokens)

    def fingerprint(self) -> str:
        """Changes whenever any count could change."""
        return f"image:{self.rows}x{self.cols}:{self.num_tokens}"
