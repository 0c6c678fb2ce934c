from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from llava_scale.data.media import ImageTransform
from llava_scale.data.sampling import FrameSampling
from llava_scale.data.toy.encoding import encode_video
from llava_scale.data.video import VideoTransform
from llava_scale.eval.result import film_strip
from llava_scale.types import EncodedMedium

SIDE = 24


def transform_of(num_frames: int) -> VideoTransform:
    return VideoTransform(
        image=ImageTransform(SIDE, "pad", (255, 255, 255), 10_000),
        sampling=FrameSampling(scheme="uniform", num_frames=num_frames),
    )


@pytest.fixture
def video() -> bytes:
    """Twenty frames, each darker than the one before."""
    return encode_video(np.stack([np.full((SIDE, SIDE, 3), 240 - 12 * place, np.uint8) for place in range(20)]))


def brightness(strip: bytes, num_frames: int) -> list[float]:
    picture = np.asarray(Image.open(io.BytesIO(strip)).convert("L"), dtype=float)
    step = SIDE + 2
    return [picture[row * step + 12, column * step + 12] for row, column in (divmod(n, 4) for n in range(num_frames))]


@pytest.mark.parametrize(("seen", "shown", "rows"), [(3, 3, 1), (8, 8, 2), (20, 16, 4)])
def test_frames_are_shown_in_their_order_row_by_row(video: bytes, seen: int, shown: int, rows: int) -> None:
    strip = film_strip(video, transform_of(seen))
    assert Image.open(io.BytesIO(strip)).height == rows * (SIDE + 2)
    found = brightness(strip, shown)
    assert found == sorted(found, reverse=True)
    assert found[0] - found[-1] > 100


def test_a_clip_shows_its_own_frames(video: bytes) -> None:
    early, late = (
        brightness(film_strip(EncodedMedium(video, clip=clip), transform_of(4)), 4)
        for clip in ((0.0, 1.0), (1.5, None))
    )
    assert max(late) < min(early)


def test_what_cannot_be_decoded_is_not_shown() -> None:
    assert film_strip(b"no video", transform_of(4)) == b""
