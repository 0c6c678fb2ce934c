"""Token counts of media, for the data layer: plain numbers, no weights."""

from __future__ import annotations

from dataclasses import dataclass

from llava_scale.compressors import TokenCount
from llava_scale.errors import SampleError
from llava_scale.types import MediaInfo, MediaTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTokenCounter:
    """Every picture is resized to one size, so each takes the same number of tokens at a step.

    Attributes:
        rows: Rows of the tower's grid.
        cols: Columns of the tower's grid.
        num_tokens: Features of one picture.
        compressor: How many tokens become of them in the text; None where all stay.
    """

    rows: int
    cols: int
    num_tokens: int
    compressor: TokenCount | None = None

    def count(self, info: MediaInfo, *, step: int | None) -> MediaTokens:
        """Tokens of one picture at optimizer step ``step`` (None: evaluation).

        Raises:
            SampleError: the medium is not a picture.
        """
        if info.kind != "image":
            raise SampleError(f"this model reads images and text, but the sample holds {info.kind}; leave it out")
        grid = (1, self.rows, self.cols)
        num_tokens = self.num_tokens if self.compressor is None else self.compressor.num_tokens(grid, step)
        return MediaTokens(grid=grid, num_tokens=num_tokens)

    def fingerprint(self) -> str:
        """Changes whenever any count could change."""
        compressed = "" if self.compressor is None else f":{self.compressor!r}"
        return f"image:{self.rows}x{self.cols}:{self.num_tokens}{compressed}"
