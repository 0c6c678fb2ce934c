"""A command in several processes of this machine, which share its work."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_S = 24 * 3600.0
"""How long a process waits for the slowest one where they seldom meet."""

_GRACE_S = 60.0
"""How long the others may go on after one process failed: they notice by themselves, and may be saving."""


def run_in_processes(arguments: Sequence[str], number: int) -> int:
    """Run ``llava-scale ARGUMENTS`` in ``number`` processes; return the first exit code that is not 0, or 0.

    The variables are torchrun's (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). The processes divide the
    cores. An interrupt and SIGTERM are theirs, so that they can save; this waits for them.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // number)
    shared = {"OMP_NUM_THREADS": str(threads), **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not {"", str(Path.cwd())} & set(sys.path):
        shared["PYTHONSAFEPATH"] = "1"  # "-m" would look for this package in the current folder first
    command = [sys.executable, "-m", "llava_scale", *arguments]
    children = [
        subprocess.Popen(command, env={**shared, "WORLD_SIZE": str(number), "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(number)
    ]

    def pass_on(*_: object) -> None:
        for child in children:
            child.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        _wait(children)
    finally:
        signal.signal(signal.SIGTERM, before)
    codes = [child.returncode if child.returncode >= 0 else 128 - child.returncode for child in children]
    return next((code for code in codes if code), 0)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> None:
    failed_at = None
    while None in (codes := [child.poll() for child in children]):
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + _GRACE_S:
            for child in children:
                child.kill()
        with suppress(KeyboardInterrupt):
            time.sleep(0.1)
