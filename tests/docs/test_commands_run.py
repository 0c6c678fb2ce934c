"""Every command of the documentation runs as it is written, or is listed with the reason why not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.docs.pages import NOT_RUN, PAGES, ROOT, commands, python_blocks, shown_files
from tests.docs.stand_ins import STAND_INS, before, save_model

ENDLESS = {"serve": "http://127.0.0.1:8000/health", "demo": "http://127.0.0.1:7860/"}
"""Commands that go on until they are ended, and where they answer."""


def runnable(page):
    return [command for command in commands(page) if not command.reason]


def test_every_command_is_run_or_has_a_reason_why_not():
    found = {page.name: commands(page) for page in PAGES}
    assert sum(map(len, found.values())) > 50
    assert [
        name for name in found if any(not command.reason for command in found[name]) and name not in STAND_INS
    ] == []
    assert {command.reason for group in found.values() for command in group} == {"", *NOT_RUN.values()}


def test_commands_are_shortened_where_they_would_take_long():
    texts = [command.shortened for page in PAGES for command in runnable(page) if " train " in f" {command.text} "]
    assert len(texts) > 8
    assert [text for text in texts if "train.steps=2 " not in text and "train.steps=4 " not in text] == []


@pytest.fixture
def shell(tmp_path):
    """Runs a line in the scratch folder, with the program and this Python first on the path."""
    programs = tmp_path / "programs"
    programs.mkdir()
    program = programs / "llava-scale"
    program.write_text(f"#!{sys.executable}\nfrom llava_scale.cli import main\nmain()\n")
    program.chmod(0o755)
    folder = tmp_path / "scratch"
    folder.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def run(line):
        line = line.replace("PYTHONPATH=", f"PYTHONPATH={ROOT}:")
        done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=900, check=False)  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    run.folder, run.environment = folder, environment
    return run


def started(shell, line, address):
    """A server, once it answers."""
    process = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=shell.folder, env=shell.environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    for _ in range(600):
        if process.poll() is not None:
            raise AssertionError(f"{line}\n{process.stderr.read()[-3000:]}")
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                assert answer.status == 200
            return process
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{line}: no answer at {address}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_one_after_the_other(page, shell):
    if page.name == "serve.md":
        pytest.importorskip("gradio", reason="the extra [demo] is not installed")
    STAND_INS[page.name](shell.folder, shell)
    for name, content in shown_files(page).items():
        (shell.folder / name).write_text(content)
    servers = []
    try:
        for command in runnable(page):
            before(command.text, shell.folder)
            address = next((url for word, url in ENDLESS.items() if f"llava-scale {word} " in command.text), "")
            if address:
                servers.append(started(shell, command.shortened, address))
            else:
                shell(command.shortened)
        for code in python_blocks(page):
            run_python(code, page, shell)
    finally:
        for server in servers:
            server.terminate()
            server.wait(60)


HEARING = """
import pathlib
import shutil

import av

from llava_scale.model import load_model


def is_heard(path):
    with av.open(str(path)) as file:
        return bool(file.streams.audio)


processor = load_model("hearing")[1]
shutil.copy(next(path for path in pathlib.Path("toy").rglob("*.mp4") if is_heard(path)), "clip.mp4")
"""
"""What the example for videos and sounds goes on from."""


def run_python(code, page, shell):
    """Run an example of a page, behind what the page says in words."""
    first = ""
    if page.name == "video_audio.md":
        save_model(shell.folder / "hearing", "model.audio_tower=tiny")
        first = HEARING
    (shell.folder / "example.py").write_text(first + code)
    shell("python example.py")
