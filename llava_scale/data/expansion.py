"""From placeholders to the positions of media: their tokens, time stamps between frames, sound beside its video.

A medium without parts is one run of its placeholder's id. One with parts (``types.TokenPart``) has text before some of
them; a sound with parts right behind a video with parts is laid between the frames, ``SOUND_CHUNK_S`` of both in turn.
The number of positions is the same in either order, so planning needs no more than each medium's own count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llava_scale.types import IGNORE_INDEX, MediaKind, MediaTokens, TokenPart

IntArray = NDArray[np.int64]

SOUND_CHUNK_S = 2.0
"""Video and sound that take turns, in seconds."""


class MediaBlock(NamedTuple):
    """Positions that one medium takes, or a video and its sound together.

    Attributes:
        place: Of its first placeholder in the text.
        num_media: Media that lie in it; their placeholders are neighbours.
        ids: What stands there instead.
    """

    place: int
    num_media: int
    ids: list[int]


def media_blocks(
    places: Sequence[int], media: Sequence[tuple[MediaKind, MediaTokens]], placeholder_ids: Mapping[MediaKind, int]
) -> list[MediaBlock]:
    """The positions of all media of a text, in order.

    Args:
        places: Where their placeholders stand, ascending.
        media: Kind and tokens of each.
        placeholder_ids: The id of each kind.
    """
    blocks: list[MediaBlock] = []
    for number, (place, (kind, counted)) in enumerate(zip(places, media, strict=True)):
        before = media[number - 1] if number and places[number - 1] == place - 1 else None
        if kind == "audio" and counted.parts and before is not None and before[0] == "video" and before[1].parts:
            ids = _in_turn(before[1].parts, counted.parts, placeholder_ids)
            blocks[-1] = MediaBlock(place - 1, 2, ids)
        else:
            parts = counted.parts or (TokenPart(0.0, counted.num_tokens),)
            blocks.append(MediaBlock(place, 1, _ids(parts, placeholder_ids[kind])))
    return blocks


def expanded(ids: Sequence[int], blocks: Sequence[MediaBlock]) -> list[int]:
    """The text with its media in their places."""
    found: list[int] = []
    start = 0
    for block in blocks:
        found += ids[start : block.place]
        found += block.ids
        start = block.place + block.num_media
    return [*found, *ids[start:]]


def with_media(
    ids: IntArray,
    labels: IntArray,
    places: Sequence[int],
    media: Sequence[tuple[MediaKind, MediaTokens]],
    placeholder_ids: Mapping[MediaKind, int],
) -> tuple[IntArray, IntArray]:
    """Ids and labels of a text with its media; nothing of a medium is supervised, time stamps neither."""
    if any(counted.parts for _, counted in media):
        blocks = media_blocks(places, media, placeholder_ids)
        return np.array(expanded(ids.tolist(), blocks)), _expanded_labels(labels, blocks)
    labels[places] = IGNORE_INDEX
    repeats = [counted.num_tokens for _, counted in media]
    return _repeated(ids, places, repeats), _repeated(labels, places, repeats)


def _expanded_labels(labels: IntArray, blocks: Sequence[MediaBlock]) -> IntArray:
    parts, start = [], 0
    for block in blocks:
        parts += [labels[start : block.place], np.full(len(block.ids), IGNORE_INDEX)]
        start = block.place + block.num_media
    return np.concatenate([*parts, labels[start:]])


def _repeated(values: IntArray, places: Sequence[int], repeats: Sequence[int]) -> IntArray:
    """``values`` with the value of each place as often as ``repeats`` says."""
    parts, start = [], 0
    for place, number in zip(places, repeats, strict=True):
        parts += [values[start:place], np.full(number, values[place])]
        start = place + 1
    return np.concatenate([*parts, values[start:]])


def _ids(parts: Sequence[TokenPart], placeholder_id: int) -> list[int]:
    return [token for part in parts for token in (*part.before, *[placeholder_id] * part.num_tokens)]


def _in_turn(video: Sequence[TokenPart], sound: Sequence[TokenPart], ids: Mapping[MediaKind, int]) -> list[int]:
    """Parts of both by their time: in each chunk the frames, then what is heard."""
    stretches = chain(((part, ids["video"]) for part in video), ((part, ids["audio"]) for part in sound))
    ordered = sorted(stretches, key=lambda stretch: int(stretch[0].time_s // SOUND_CHUNK_S))  # stable: frames first
    return [token for part, marker in ordered for token in _ids((part,), marker)]
