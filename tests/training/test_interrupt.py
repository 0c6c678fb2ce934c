from __future__ import annotations

import os
import signal

import pytest

from llava_scale.training.interrupt import StopRequest


@pytest.fixture(autouse=True)
def usual_handler():
    """Python's own handler, also where the shell started the tests with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_is_a_request_and_the_second_acts_as_usual():
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_without_a_signal_there_is_no_request_and_the_handlers_return():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) != before
    assert not stop
    assert signal.getsignal(signal.SIGTERM) == before
