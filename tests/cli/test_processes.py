from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llava_scale.cli import processes
from llava_scale.cli.processes import run_in_processes


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Stands in for ``python -m llava_scale``: runs lines that know ``rank`` and ``folder``."""

    def write(lines):
        package = tmp_path / "llava_scale"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
        begin = (
            f"import os, pathlib, sys, time\nrank = int(os.environ['RANK'])\nfolder = pathlib.Path({str(tmp_path)!r})\n"
        )
        (package / "__main__.py").write_text(begin + textwrap.dedent(lines))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return write


def test_each_process_knows_its_place_and_its_share_of_the_cores(program, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folder = program("""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
        told = [*(os.environ[name] for name in names), *sys.argv[1:]]
        (folder / f"told{rank}").write_text(" ".join(told))
    """)
    assert run_in_processes(["train", "recipe"], 2) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    told = [(folder / f"told{rank}").read_text() for rank in range(2)]
    assert told == [f"{rank} {rank} 2 127.0.0.1 {threads} train recipe" for rank in range(2)]


@pytest.mark.parametrize(("line", "code"), [("sys.exit(3 if rank else 0)", 3), ("os.abort() if rank else 0", 134)])
def test_the_code_of_a_process_that_failed_is_returned(program, line, code):
    program(line)
    assert run_in_processes([], 2) == code


def test_the_others_are_ended_where_they_do_not_notice(program, monkeypatch):
    monkeypatch.setattr(processes, "_GRACE_S", 0.2)
    program("sys.exit(4) if rank else time.sleep(60)")
    started = time.monotonic()
    assert run_in_processes([], 2) in {4, 137}
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_left_to_the_processes(program, number):
    folder = program("""
        import signal
        def stop(*_):
            (folder / f"saved{rank}").touch()
            sys.exit(5)
        signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)
        (folder / f"ready{rank}").touch()
        time.sleep(60)
    """)
    script = "import sys; from llava_scale.cli.processes import run_in_processes; sys.exit(run_in_processes([], 2))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = str(Path(processes.__file__).parents[2])
    start = f"import os, sys; sys.path.insert(0, {where!r}); os.environ['PYTHONPATH'] = {str(folder)!r}\n{script}"
    parent = subprocess.Popen([sys.executable, "-c", start], cwd="/", env=environment, start_new_session=True)
    while not all((folder / f"ready{rank}").exists() for rank in range(2)):
        assert parent.poll() is None
        time.sleep(0.05)
    # A terminal sends an interrupt to all of them; SIGTERM comes to the parent alone.
    (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
    assert parent.wait(timeout=30) == 5
    assert all((folder / f"saved{rank}").exists() for rank in range(2))
