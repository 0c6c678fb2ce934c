"""Give a folder of shards from elsewhere its indexes and its ``dataset.json``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_scale.data.engines import run_tasks
from llava_scale.data.indexing import build_index
from llava_scale.data.manifest import MANIFEST, DatasetInfo
from llava_scale.data.opening import index_name, load_index
from llava_scale.data.store import LocalStore, local_path
from llava_scale.errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class IndexResult:
    """The data set as indexed, and how many indexes were made anew."""

    info: DatasetInfo
    num_built: int


def index_folder(
    path: str,
    *,
    workers: int = 1,
    rebuild: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> IndexResult:
    """Index every ``*.tar`` of a local folder and describe them in ``dataset.json``, in the order of their names.

    Indexes that are younger than their tar and agree with its size are kept.

    Args:
        path: Folder.
        workers: Processes.
        rebuild: Make every index anew.
        on_progress: Called with (shards done, shards in all).

    Raises:
        ShardError: if there is no shard, the path is remote, or shards are damaged (all of them are named).
    """
    folder = local_path(path)
    if folder is None:
        raise ShardError(f"{path}: indexes are written beside the shards; index where the folder is local, then upload")
    names = LocalStore(folder).list_tars() if folder.is_dir() else []
    if not names:
        raise ShardError(f"{path}: no *.tar shards here")
    todo = [folder / name for name in names if rebuild or not _is_current(folder / name)]
    done, broken = len(names) - len(todo), []
    for _, problem in run_tasks(_index_shard, todo, workers=workers):
        done += 1
        broken += [problem] if problem else []
        on_progress(done, len(names))
    if broken:
        raise ShardError("\n".join([f"{len(broken)} of {len(names)} shards cannot be indexed:", *sorted(broken)]))
    info = DatasetInfo.of((load_index(folder / name) for name in names), prepared=_known_preparation(folder))
    info.save(folder)
    return IndexResult(info, len(todo))


def _index_shard(path: Path) -> str:
    """Write the index of one shard; return what is wrong with it, "" if nothing."""
    store = LocalStore(path.parent)
    try:
        index = build_index(
            lambda offset, size: store.read(path.name, offset, size), store.size(path.name), name=path.name
        )
    except ShardError as error:
        return str(error)
    index.save(path.with_name(index_name(path.name)))
    return ""


def _is_current(path: Path) -> bool:
    try:
        index_path = path.with_name(index_name(path.name))
        status = path.stat()
        return load_index(path).tar_bytes == status.st_size and index_path.stat().st_mtime_ns >= status.st_mtime_ns
    except (OSError, ShardError):
        return False


def _known_preparation(folder: Path) -> dict[str, object]:
    """Return what an older ``dataset.json`` says of prepared media: the tars do not tell."""
    with contextlib.suppress(OSError, ShardError):
        return DatasetInfo.from_bytes((folder / MANIFEST).read_bytes(), str(folder / MANIFEST)).prepared
    return {}
