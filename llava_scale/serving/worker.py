"""The thread that owns the model: answers are handed to it, their tokens are handed back."""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llava_scale.serving.decoding import Answer, Decoder, FinishReason

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step did to one answer.

    Attributes:
        answer: Whose.
        new_ids: Its new tokens.
        finish: Why it ended; empty while it goes on.
        error: What went wrong, where ``finish`` is ``error``.
    """

    answer: Answer
    new_ids: tuple[int, ...]
    finish: FinishReason
    error: BaseException | None


class Worker:
    """Runs a decoder in a thread of its own.

    Args:
        decoder: Used by nobody else from here on.
        deliver: Called in the thread after each step with what it did; must return quickly.
    """

    def __init__(self, decoder: Decoder, deliver: Callable[[Sequence[Progress]], None]) -> None:
        self._decoder = decoder
        self._deliver = deliver
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._given: dict[Answer, int] = {}
        self._thread = threading.Thread(target=self._work, name="llava-scale-worker", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether answers are worked on."""
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """Answers in the batch, about."""
        return self._decoder.num_running

    @property
    def num_waiting(self) -> int:
        """Answers that wait for room in it, about."""
        return self._decoder.num_waiting

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End after the current step; answers that run are ended with an error."""
        self._commands.put(None)
        self._thread.join()

    def submit(self, answer: Answer) -> None:
        """Let ``answer`` join the batch."""
        self._commands.put(lambda: self._add(answer))

    def cancel(self, answer: Answer) -> None:
        """Take ``answer`` out of the batch; nothing more is delivered of it."""
        self._commands.put(lambda: self._remove(answer))

    def _add(self, answer: Answer) -> None:
        self._given[answer] = 0
        self._decoder.add(answer)

    def _remove(self, answer: Answer) -> None:
        self._given.pop(answer, None)
        self._decoder.cancel(answer)

    def _work(self) -> None:
        while self._obey():
            try:
                changed = self._decoder.step()
            except Exception as error:  # the server stays up: who was in the batch is told
                _log.exception("a step of generation failed")
                changed = self._decoder.fail(error)
            self._report(changed)
        self._report(self._decoder.fail(RuntimeError("the server is shutting down")))

    def _obey(self) -> bool:
        """Do what was asked for; waits while there is nothing to work on. False at the end."""
        while True:
            idle = not (self._decoder.num_running or self._decoder.num_waiting)
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _report(self, changed: Sequence[Answer]) -> None:
        reports = []
        for answer in changed:
            given = self._given.get(answer)
            if given is None:
                continue
            reports.append(Progress(answer, tuple(answer.new_ids[given:]), answer.finish, answer.error))
            self._given[answer] = len(answer.new_ids)
            if answer.finish:
                del self._given[answer]
        if reports:
            self._deliver(reports)
