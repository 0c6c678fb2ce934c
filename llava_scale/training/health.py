"""Signs of life: a heartbeat file for whoever watches the run, and the stacks of a process that is stuck."""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from llava_scale.training.files import replace_text

if TYPE_CHECKING:
    from pathlib import Path
    from typing import TextIO


logger = logging.getLogger(__name__)


class Health:
    """Watches one process of a run.

    ``beat`` after each step writes ``rank-00000.json`` (step, time, host, process) at most every ``heartbeat_s``
    seconds. If no step is finished for ``stuck_after_s`` seconds (or up to a tenth less), the stacks of all threads go
    into ``stacks-00000.txt``, again and again, whatever the process hangs in; the run itself is left alone. It also
    goes on, after one warning, where these files cannot be written: a full disk, a folder that was moved away.

    Args:
        folder: Where the files go.
        rank: Number of this process.
        heartbeat_s: 0 for no heartbeat.
        stuck_after_s: 0 for no watch.
    """

    def __init__(self, folder: Path, *, rank: int, heartbeat_s: float, stuck_after_s: float) -> None:
        self._beats, self._stacks = folder / f"rank-{rank:05d}.json", folder / f"stacks-{rank:05d}.txt"
        self._heartbeat_s, self._stuck_after_s = heartbeat_s, stuck_after_s
        self._last, self._armed = -math.inf, -math.inf
        self._file: TextIO | None = None
        self._warned = False
        if heartbeat_s or stuck_after_s:
            folder.mkdir(parents=True, exist_ok=True)

    def beat(self, step: int) -> None:
        """Note that ``step`` steps are finished."""
        try:
            self._beat(step)
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning("no signs of life in %s: %s; the run goes on", self._beats.parent, error)

    def _beat(self, step: int) -> None:
        now = time.monotonic()
        if self._heartbeat_s and now - self._last >= self._heartbeat_s:
            self._last = now
            sign = {"step": step, "time": round(time.time(), 1), "host": socket.gethostname(), "pid": os.getpid()}
            replace_text(self._beats, json.dumps(sign) + "\n")
        if self._stuck_after_s and now - self._armed >= self._stuck_after_s / 10:  # arming starts a thread
            self._armed = now
            if self._file is None:
                self._file = self._stacks.open("a", encoding="utf-8")
            faulthandler.dump_traceback_later(self._stuck_after_s, repeat=True, file=self._file)

    def close(self) -> None:
        """Watch no longer; an empty file of stacks goes."""
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._file = None
        with suppress(OSError):  # the run folder may be gone
            if self._stacks.stat().st_size == 0:
                self._stacks.unlink()
