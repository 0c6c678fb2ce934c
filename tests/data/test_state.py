from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, lists, tuples

from llava_scale.data.planner import PlanState
from llava_scale.data.state import decode_state, encode_state
from llava_scale.errors import CheckpointError

FINGERPRINT = {"data sets": ["abc"], "rows_per_step": 8}


@settings(deadline=None)
@given(
    positions=lists(integers(0, 2**48), min_size=1, max_size=5),
    waiting=lists(tuples(integers(0, 4), integers(0, 2**48)), max_size=60),
    step=integers(0, 2**40),
)
def test_a_state_comes_back_from_json_unchanged(positions, waiting, step):
    waiting = tuple((source % len(positions), position) for source, position in waiting)
    state = PlanState(step, 3, tuple(positions), tuple(range(len(positions))), waiting)
    saved = json.loads(json.dumps(encode_state(state, FINGERPRINT)))
    assert decode_state(saved, FINGERPRINT) == state


def test_thousands_of_waiting_samples_take_a_few_kilobytes():
    waiting = tuple((0, 10**8 + 3 * number) for number in range(8000))
    state = PlanState(10**6, 1, (10**8 + 24_000,), (10**8,), waiting)
    assert len(json.dumps(encode_state(state, FINGERPRINT))) < 10_000


def test_another_stream_is_refused_and_the_message_says_what_differs():
    saved = encode_state(PlanState.start(1), FINGERPRINT)
    with pytest.raises(CheckpointError, match="rows_per_step was 8 and is 16"):
        decode_state(saved, {**FINGERPRINT, "rows_per_step": 16})


def test_another_version_is_refused():
    saved = encode_state(PlanState.start(1), FINGERPRINT) | {"version": 99}
    with pytest.raises(CheckpointError, match="version 99"):
        decode_state(saved, FINGERPRINT)


@pytest.mark.parametrize("damage", [{"waiting": "%%%"}, {"waiting": "AAAA"}, {"positions": None}, {"step": "x"}])
def test_damage_is_refused(damage):
    saved = encode_state(PlanState.start(1), FINGERPRINT) | damage
    with pytest.raises(CheckpointError, match="damaged"):
        decode_state(saved, FINGERPRINT)
