"""Names inside a shard: which members belong to a sample and what each of them is.

WebDataset's rule: a member's key is its path up to the first dot of the file name, the rest is its suffix.
Ours on top of it: ``json`` is the conversation, ``jpg`` a picture, ``1.jpg`` the second picture,
``0.frame007.jpg`` frame 7 of the first video (frames stored ahead of time); other suffixes are ignored.

Keys are percent-escaped where a plain id would break that rule: dots, percent signs, control characters, empty
path components, and a leading ``__`` (webdataset skips folders named ``__x__``). ``unescape_key`` gives the id back;
a foreign key that ``escape_key`` could not have written is left as it is.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote

from llava_scale.types import MediaKind

EXTENSIONS: dict[str, MediaKind] = {
    "jpg": "image",
    "jpeg": "image",
    "png": "image",
    "webp": "image",
    "gif": "image",
    "bmp": "image",
    "tif": "image",
    "tiff": "image",
    "ppm": "image",
    "mp4": "video",
    "webm": "video",
    "mkv": "video",
    "mov": "video",
    "avi": "video",
    "mp3": "audio",
    "wav": "audio",
    "flac": "audio",
    "ogg": "audio",
    "m4a": "audio",
}
"""File extension (lower case, no dot) to the kind of medium."""

RECORD_SUFFIX = "json"
NO_FRAME = -1

_MEMBER = re.compile(r"^((?:.*/|)[^./]+)\.([^/]+)$", re.DOTALL)
_SUFFIX = re.compile(r"^(?:(\d{1,9})\.)?(?:frame(\d{1,9})\.)?([a-z0-9]+)$")
_UNSAFE = re.compile("[\x00-\x1f\x7f\x80-\x9f.%\\\\\ud800-\udfff]")
_EDGE_SLASH = re.compile(r"^/|/$|(?<=/)/")


class MediaSuffix(NamedTuple):
    """What a member's suffix says: kind, extension, number among its kind, frame (``NO_FRAME`` for a whole file)."""

    kind: MediaKind
    ext: str
    number: int
    frame: int


def escape_key(key: str) -> str:
    """Return the stored form of a sample's id: any text becomes a legal WebDataset key, distinct ids stay distinct."""
    stored = _UNSAFE.sub(lambda found: _percent(found.group()), key)
    stored = _EDGE_SLASH.sub("%2F", stored)
    if stored.startswith("__"):
        stored = "%5F" + stored[1:]
    return stored


def unescape_key(stored: str) -> str:
    """Return the id behind a stored key (see the module's text for foreign keys)."""
    if "%" not in stored:
        return stored
    try:
        key = unquote(stored, errors="surrogatepass")
    except UnicodeDecodeError:
        return stored
    return key if escape_key(key) == stored else stored


def _percent(text: str) -> str:
    """Return every character of ``text`` percent-encoded in UTF-8."""
    encoded = text.encode("utf-8", "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in encoded)


def split_member(name: str) -> tuple[str, str] | None:
    """Return (stored key, lower-case suffix) of a member, or None for a file outside of any sample.

    A leading ``./`` (``tar cf x.tar .``) is dropped; hidden files and names without a dot are outside.
    """
    found = _MEMBER.match(name.removeprefix("./"))
    return (found.group(1), found.group(2).lower()) if found else None


def parse_suffix(suffix: str) -> MediaSuffix | None:
    """Return what a lower-case suffix stands for, or None where it is no medium of ours."""
    kind = EXTENSIONS.get(suffix)
    if kind is not None:
        return MediaSuffix(kind, suffix, 0, NO_FRAME)
    found = _SUFFIX.match(suffix)
    kind = EXTENSIONS.get(found.group(3)) if found else None
    if found is None or kind is None:
        return None
    number = int(found.group(1) or 0)
    if found.group(2) is None:
        return MediaSuffix(kind, found.group(3), number, NO_FRAME)
    if kind != "image":
        return None
    return MediaSuffix("video", found.group(3), number, int(found.group(2)))


def media_suffix(kind: MediaKind, ext: str, number: int, frame: int, *, count: int) -> str:
    """Return the suffix under which a medium is stored; ``count`` media of its kind are in the sample."""
    if frame != NO_FRAME:
        return f"{number}.frame{frame:03d}.{ext}"
    return ext if count == 1 and number == 0 else f"{number}.{ext}"
