"""Answers on disk, so that an evaluation that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.eval.scorers import Response

if TYPE_CHECKING:
    from llava_scale.eval.task_data import TaskItem
    from llava_scale.eval.task_file import TaskConfig

_BLOCK = 1 << 22


class AnswerCache:
    """Answers of one task by one checkpoint, in files that are only ever appended to.

    Every process writes a file of its own and reads those of all. An answer is found again by its sample, its place,
    and the digest of text, choices and media; a line that was cut off is passed over.

    Args:
        folder: Where the files are; None keeps nothing.
        checkpoint: Digest of the model.
        task: What is asked.
        rank: Number of this process.
    """

    def __init__(self, folder: Path | None, checkpoint: str, task: TaskConfig, rank: int = 0) -> None:
        self._known: dict[str, Response] = {}
        self._file: IO[str] | None = None
        self._path: Path | None = None
        if folder is None:
            return
        stem = f"{_file_name(task.name)}-{checkpoint}-{task.response_digest()}"
        for path in sorted(folder.glob(f"{stem}-*.jsonl")):
            self._read(path)
        self._path = folder / f"{stem}-{rank}.jsonl"

    def get(self, item: TaskItem) -> Response | None:
        """The answer to ``item``, if there is one."""
        return self._known.get(_name(item))

    def add(self, item: TaskItem, response: Response) -> None:
        """Keep an answer; it is on its way to the disk when this returns."""
        self._known[_name(item)] = response
        if self._path is None:
            return
        line = json.dumps({"item": _name(item), "response": asdict(response)}, ensure_ascii=False)
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
                self._file.write("\n")  # ends a line that a killed process left open
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"cannot write {self._path}: {error.strerror}; choose another --out") from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path) -> None:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line: dict[str, Any] = json.loads(text)
                    fields = line["response"]
                    response = Response(
                        text=str(fields["text"]), scores=tuple(fields["scores"]), lengths=tuple(fields["lengths"])
                    )
                    self._known[str(line["item"])] = response
                except (ValueError, KeyError, TypeError):
                    continue


def checkpoint_digest(folder: str | Path) -> str:
    """Digest of a checkpoint's config, tokenizer and weights: the same wherever it lies.

    Raises:
        CheckpointError: there are no weights.
    """
    place = Path(folder)
    files = sorted(path for path in place.glob("*") if path.suffix in (".safetensors", ".json", ".jinja"))
    files = [path for path in files if path.name != "card.json"]
    if not any(path.suffix == ".safetensors" for path in files):
        raise CheckpointError(f"{place} holds no weights (model.safetensors)")
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _name(item: TaskItem) -> str:
    return f"{item.key}#{item.place}:{item.digest}"


def _file_name(name: str) -> str:
    return "".join(char if char.isalnum() or char in "-_." else "_" for char in name)
