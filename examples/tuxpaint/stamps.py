"""Tux Paint's stamps as LLaVA JSON: pictures on white, their English descriptions, a split that does not leak.

A stamp is a description (``owl.txt``, first line English) with the drawings of one thing beside it: ``owl.png``,
``owl.svg``, ``owl_mirror.png``. Stamps that show or say nearly the same form a group, and a group lies as a
whole in training or in the held-out part (see ``group_stamps``).
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from llava_scale.errors import LlavaScaleError, SampleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

CANVAS = 256
"""Side of the square pictures in pixels."""
DROPPED_FOLDERS = ("symbols",)
"""Letters, digits, coins and notes: they must be read rather than seen, and "The letter a." would flatter the loss."""

# Words that tell variants of one thing apart; descriptions equal without them are near-duplicates.
_FILLERS = "a an the of and with some our to in on is it its this that pair one two three"
_VARIANTS = (
    "red green blue yellow orange pink purple violet brown black white grey gray silver gold golden dark light "
    "big small little large tiny very long short old new open opened closed sliced slice half whole baby young"
)
_LEFT_OUT = frozenset(re.findall(r"\w+", f"{_FILLERS} {_VARIANTS}"))
_THUMBNAIL = 12
_SAME_PICTURE = 0.98
"""Correlation of two thumbnails from which they count as the same picture."""


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """One thing: what it is called and the files that draw it.

    Attributes:
        key: Path below the stamps' folder without its ending, in lower case, with ``_`` for anything unusual.
        description: English description, white space collapsed.
        pictures: Drawings of it, pixel graphics first.
        mirrorable: Its author allows mirroring it; false for what carries writing or a fixed direction.
    """

    key: str
    description: str
    pictures: tuple[Path, ...]
    mirrorable: bool


def find_stamps(root: Path) -> list[Stamp]:
    """Return the stamps below ``root`` that have a description and a picture, ordered by key."""
    stamps = []
    for text in sorted(root.rglob("*.txt")):
        relative = text.relative_to(root).with_suffix("")
        if relative.parts[0] in DROPPED_FOLDERS:
            continue
        candidates = [text.with_name(f"{text.stem}{ending}") for ending in (".png", "_mirror.png", ".svg")]
        pictures = tuple(path for path in candidates if path.exists())
        description = english(text)
        if pictures and description:
            settings = text.with_suffix(".dat")
            nomirror = settings.exists() and "nomirror" in settings.read_text(encoding="utf-8", errors="replace")
            key = re.sub(r"[^a-z0-9/]+", "_", relative.as_posix().lower())
            stamps.append(Stamp(key=key, description=description, pictures=pictures, mirrorable=not nomirror))
    return stamps


def english(text: Path) -> str:
    """Return the first line of a description file (the English one), in NFC, with single spaces."""
    lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
    return " ".join(unicodedata.normalize("NFC", lines[0]).split()) if lines else ""


def render(path: Path) -> Image.Image:
    """Return the drawing of a PNG or SVG file on a white square of ``CANVAS`` pixels, cut to what is visible.

    Raises:
        SampleError: the file is no picture, or nothing of it is visible.
        LlavaScaleError: it is an SVG, and there is no renderer.
    """
    try:
        with _open_svg(path) if path.suffix == ".svg" else Image.open(path) as picture:
            drawing = picture.convert("RGBA")
    except (OSError, ValueError) as error:
        raise SampleError(f"cannot read the picture: {error}", shard=str(path)) from None
    box = drawing.getchannel("A").getbbox()
    if box is None:
        raise SampleError("nothing of the picture is visible", shard=str(path))
    return on_white(drawing.crop(box))


def _open_svg(path: Path) -> Image.Image:
    try:
        import resvg_py  # type: ignore[import-not-found]
    except ImportError:
        raise LlavaScaleError("SVG pictures need resvg-py; run: pip install resvg-py") from None
    # Lengths in cm or pt need a resolution; system fonts would make the pictures depend on the machine.
    data = resvg_py.svg_to_bytes(svg_path=str(path), width=2 * CANVAS, dpi=96.0, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data)))


def on_white(drawing: Image.Image, *, margin: float = 0.04) -> Image.Image:
    """Return an RGBA drawing scaled into a white square with ``margin`` (share of the side) left free around it."""
    inner = CANVAS * (1 - 2 * margin)
    scale = inner / max(drawing.size)
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    scaled = drawing.resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGBA", (CANVAS, CANVAS), "white")
    canvas.alpha_composite(scaled, ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2))
    return canvas.convert("RGB")


def group_stamps(stamps: Sequence[Stamp], thumbnails: Sequence[np.ndarray]) -> list[list[int]]:
    """Return positions of ``stamps`` in groups that must not be torn apart by a split.

    Two stamps belong together, directly or through others, when they

    - lie in one folder under names that begin with the same word (``grave-a``, ``grave-b``; ``rocket2``, ``rocket3``);
    - have descriptions with the same words, colours, sizes and articles left out ("A lemon.", "A yellow lemon.");
    - have nearly the same picture, also mirrored (``thumbnails``, as ``thumbnail`` makes them, correlate > 0.98).
    """
    parent = list(range(len(stamps)))

    def root_of(position: int) -> int:
        while parent[position] != position:
            position = parent[position]
        return position

    def join(positions: Iterable[int]) -> None:
        roots = sorted({root_of(position) for position in positions})
        for other in roots[1:]:
            parent[other] = roots[0]

    by_name: dict[str, list[int]] = defaultdict(list)
    for position, stamp in enumerate(stamps):
        by_name["name " + series_name(stamp.key)].append(position)
        by_name["words " + core_words(stamp.description)].append(position)
    for positions in by_name.values():
        join(positions)
    for pair in _same_pictures(thumbnails):
        join(pair)
    groups: dict[int, list[int]] = defaultdict(list)
    for position in range(len(stamps)):
        groups[root_of(position)].append(position)
    return list(groups.values())


def series_name(key: str) -> str:
    """Return folder and first word of the key, which the members of a series share: ``grave_a`` and ``grave_b``.

    A name without a first word of three letters is returned whole.
    """
    folder, _, name = key.rpartition("/")
    word = re.match(r"[a-z]{3,}", name)
    return f"{folder}/{word.group() if word else name}"


def core_words(description: str) -> str:
    """Return the description's words in order, without articles, colours and sizes; all words if none remain."""
    words = re.findall(r"\w+", description.lower())
    core = [word for word in words if word not in _LEFT_OUT]
    return " ".join(core or words)


def thumbnail(picture: Image.Image) -> np.ndarray:
    """Return a small colour version of the picture as a unit vector, to compare pictures by their dot product."""
    small = picture.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32) - 255.0
    return pixels / max(float(np.linalg.norm(pixels)), 1e-6)


def _same_pictures(thumbnails: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    if not thumbnails:
        return []
    flat = np.stack([item.reshape(-1) for item in thumbnails])
    mirrored = np.stack([item[:, ::-1].reshape(-1) for item in thumbnails])
    alike = np.maximum(flat @ flat.T, flat @ mirrored.T) > _SAME_PICTURE
    return [(int(a), int(b)) for a, b in np.argwhere(np.triu(alike, k=1))]


def split_stamps(stamps: Sequence[Stamp], groups: Sequence[Sequence[int]], share: float) -> tuple[list[int], list[int]]:
    """Return positions of the training and of the held-out stamps, in order.

    A group is held out if the hash of its first key lies below ``share``. Of held-out stamps with the same
    description only the first counts, so that each held-out caption belongs to one picture; the others go unused.
    """
    train: list[int] = []
    held_out: list[int] = []
    captions: set[str] = set()
    for members in groups:
        name = min(stamps[position].key for position in members)
        digest = hashlib.sha256(name.encode()).digest()
        if int.from_bytes(digest[:8], "big") / 2**64 >= share:
            train += members
            continue
        for position in sorted(members):
            if stamps[position].description not in captions:
                captions.add(stamps[position].description)
                held_out.append(position)
    return sorted(train), sorted(held_out)
