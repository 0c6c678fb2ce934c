"""The state of a stream as a small JSON-able dict, and the check that it belongs to the stream it is given to."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from llava_scale.data.planner import PlanState
from llava_scale.errors import CheckpointError

FORMAT_VERSION = 1

_CONTINUE = 0x80


def encode_state(state: PlanState, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dict that ``decode_state`` reads back."""
    return {
        "version": FORMAT_VERSION,
        "fingerprint": dict(fingerprint),
        "step": state.step,
        "epoch": state.epoch,
        "positions": list(state.positions),
        "counts": list(state.counts),
        "waiting": _pack(state.waiting, state.positions),
    }


def decode_state(state: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> PlanState:
    """Return where to continue.

    Raises:
        CheckpointError: if the state is of another version, damaged, or of another stream; names what differs.
    """
    version = state.get("version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"loader state has version {version!r}, this release reads {FORMAT_VERSION}")
    _check(state.get("fingerprint", {}), fingerprint)
    try:
        positions = tuple(int(position) for position in state["positions"])
        counts = tuple(int(count) for count in state["counts"])
        waiting = _unpack(state["waiting"], positions)
        return PlanState(int(state["step"]), int(state["epoch"]), positions, counts, waiting)
    except (KeyError, TypeError, ValueError, IndexError, zlib.error) as error:
        raise CheckpointError(f"loader state is damaged ({error}); resume from another checkpoint") from error


def _check(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    differing = [
        f"{name} was {saved.get(name)!r} and is {current.get(name)!r}"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise CheckpointError(
            "the saved position belongs to another stream of samples: "
            + "; ".join(differing)
            + "; resume with the settings of the checkpoint, or start a new run from its weights"
        )


def _pack(places: Sequence[tuple[int, int]], positions: Sequence[int]) -> str:
    """Compress (data set, position) pairs: differences inside each data set, as varints, deflated.

    Waiting samples are recent and mostly in order, so a sample takes about one byte.
    """
    previous = list(positions)
    packed = bytearray()
    for source, position in places:
        difference = position - previous[source]
        previous[source] = position
        zigzag = difference << 1 if difference >= 0 else (-difference << 1) - 1
        value = zigzag * len(positions) + source
        while value >= _CONTINUE:
            packed.append(value & (_CONTINUE - 1) | _CONTINUE)
            value >>= 7
        packed.append(value)
    return base64.b64encode(zlib.compress(bytes(packed), 9)).decode("ascii")


def _unpack(text: str, positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    previous = list(positions)
    places = []
    value = shift = 0
    for byte in zlib.decompress(base64.b64decode(text, validate=True)):
        value |= (byte & (_CONTINUE - 1)) << shift
        shift += 7
        if byte & _CONTINUE:
            continue
        zigzag, source = divmod(value, len(positions))
        previous[source] += -((zigzag + 1) >> 1) if zigzag & 1 else zigzag >> 1
        places.append((source, previous[source]))
        value = shift = 0
    return tuple(places)
