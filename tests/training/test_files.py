from __future__ import annotations

import errno
from contextlib import suppress

import pytest

from llava_scale.errors import CheckpointError
from llava_scale.training.files import atomic_folder, atomic_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with atomic_folder(tmp_path / "a" / "new") as partial:
        (partial / "x").write_text("1")
        assert not (tmp_path / "a" / "new").exists()
    assert (tmp_path / "a" / "new" / "x").read_text() == "1"
    assert names(tmp_path / "a") == ["new"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path):
    with atomic_folder(tmp_path / "new") as partial:
        (partial / "x").write_text("old")
    with suppress(RuntimeError), atomic_folder(tmp_path / "new") as partial:
        (partial / "x").write_text("half")
        raise RuntimeError
    assert (tmp_path / "new" / "x").read_text() == "old"
    assert names(tmp_path) == ["new"]


def test_a_full_disk_is_reported_with_the_place_and_what_to_do(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*new: .*No space left.*--resume"),
        atomic_folder(tmp_path / "new"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "new") as partial:
            (partial / name).write_text(name)
    assert names(tmp_path / "new") == ["second"]
    assert names(tmp_path) == ["new"]


def test_what_a_killed_process_left_does_not_stand_in_the_way(tmp_path):
    for left in (".new.partial", ".new.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "junk").write_text("x")
    with atomic_folder(tmp_path / "new") as partial:
        assert names(partial) == []
    assert names(tmp_path / "new") == []
    with atomic_folder(tmp_path / "new"):
        pass
    assert names(tmp_path) == ["new"]


def test_text_is_replaced_as_a_whole(tmp_path):
    atomic_text(tmp_path / "a", "one")
    atomic_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert names(tmp_path) == ["a"]
