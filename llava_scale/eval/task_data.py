"""Samples of a task as questions with references and choices."""

from __future__ import annotations

import hashlib
import json
import random
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_scale.data.dataset import ShardedDataset, open_dataset
from llava_scale.data.records import parse_record
from llava_scale.errors import ConfigError, SampleError
from llava_scale.eval.tasks import Question, questions_of
from llava_scale.types import MEDIA_KINDS, PLACEHOLDERS, MediaKind, Sample, Turn

if TYPE_CHECKING:
    from llava_scale.eval.task_file import TaskConfig

_PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))
_CHUNK = 256  # samples read together


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskItem:
    """One question of a task.

    Attributes:
        number: Number of the sample in its data.
        place: Number of the answer in its sample.
        key: Key of the sample.
        question: As it is asked; without media once it is answered.
        references: Right answers.
        choices: What is chosen from; empty where answers are written.
        answer: Number of the right choice.
        digest: Of text, choices and media.
        files: Media with their extensions, per kind; empty once it is answered.
    """

    number: int
    place: int
    key: str
    question: Question
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    answer: int = 0
    digest: str = ""
    files: dict[MediaKind, tuple[tuple[str, bytes], ...]] = field(default_factory=dict)

    def light(self) -> TaskItem:
        """The same without its media."""
        return replace(self, question=replace(self.question, media={}), files={})


@dataclass(slots=True)
class RecordFile:
    """Records of a JSON file as samples."""

    path: str
    records: list[dict[str, Any]]
    root: Path
    keys: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = [str(record.get("id", number)) for number, record in enumerate(self.records)]

    def __len__(self) -> int:
        return len(self.records)

    def samples(self, numbers: Sequence[int]) -> list[Sample | SampleError]:
        """Samples by their numbers, a bad one as its error."""
        found: list[Sample | SampleError] = []
        for number in numbers:
            try:
                found.append(self._sample(number))
            except SampleError as error:
                found.append(error.at(shard=self.path, key=self.keys[number]))
        return found

    def _sample(self, number: int) -> Sample:
        record = self.records[number]
        media: dict[MediaKind, tuple[tuple[str, bytes], ...]] = {}
        for kind in MEDIA_KINDS:
            names = record.get(kind, record.get(f"{kind}s", []))
            paths = [self.root / name for name in ([names] if isinstance(names, str) else names)]
            if paths:
                media[kind] = tuple((path.suffix.lstrip(".").lower(), _read(path)) for path in paths)
        turns = parse_record(_conversation(record), {kind: len(items) for kind, items in media.items()})
        extra = {name: value for name, value in record.items() if name not in ("id", "conversations")}
        return Sample(key=self.keys[number], shard=self.path, turns=turns, media=media, extra=extra)


TaskSource = ShardedDataset | RecordFile


def open_source(task: TaskConfig) -> TaskSource:
    """The data of a task.

    Raises:
        ConfigError: a JSON file that cannot be read.
        ShardError: no shards there.
    """
    if not task.data.endswith((".json", ".jsonl")):
        return open_dataset(task.data)
    path = Path(task.data)
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]
        records = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"task {task.name}: cannot read {path}: {error}") from None
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise ConfigError(f"task {task.name}: {path} must hold a list of records")
    return RecordFile(task.data, records, Path(task.media_root) if task.media_root else path.parent)


def read_items(
    task: TaskConfig, source: TaskSource, numbers: Sequence[int], captions: Sequence[str] = ()
) -> Iterator[list[TaskItem | SampleError]]:
    """Questions of the samples with these numbers, a chunk of samples at a time; errors of unusable ones.

    Args:
        task: What is asked.
        source: Its data.
        numbers: Samples to read.
        captions: ``ranking``: what candidates are drawn from.
    """
    for start in range(0, len(numbers), _CHUNK):
        chunk = numbers[start : start + _CHUNK]
        items: list[TaskItem | SampleError] = []
        for number, sample in zip(chunk, source.samples(chunk), strict=True):
            if isinstance(sample, SampleError):
                items.append(sample)
            elif all(sample.extra.get(name) == value for name, value in task.where.items()):
                items += _items(task, sample, number, captions)
        yield items


def all_captions(task: TaskConfig, source: TaskSource, numbers: Sequence[int]) -> list[str]:
    """First answers of the samples, each once, in a fixed order: what ``ranking`` draws candidates from.

    Raises:
        ConfigError: fewer than two.
    """
    found: set[str] = set()
    for items in read_items(replace(task, scorer="exact_match", prompt=""), source, numbers):
        found.update(item.references[0] for item in items if isinstance(item, TaskItem) and item.place == 0)
    if len(found) < 2:
        raise ConfigError(f"task {task.name}: ranking needs two different captions or more, found {len(found)}")
    return sorted(found)


def _items(task: TaskConfig, sample: Sample, number: int, captions: Sequence[str]) -> Iterator[TaskItem | SampleError]:
    questions = questions_of(sample, number)
    for place, question in enumerate(questions if task.is_generated else questions[:1]):
        try:
            references = _references(sample, question, alone=len(questions) == 1)
            choices, answer = _choices(task, sample, references[0], captions)
            asked = replace(question, turns=_prompted(task, sample, question, choices))
            item = TaskItem(
                number=number,
                place=place,
                key=sample.key,
                question=asked,
                references=references,
                choices=choices,
                answer=answer,
                files={kind: sample.media[kind][: len(found)] for kind, found in question.media.items()},
            )
            yield replace(item, digest=_digest(item))
        except SampleError as error:
            yield error.at(shard=sample.shard, key=sample.key)


def _references(sample: Sample, question: Question, *, alone: bool) -> tuple[str, ...]:
    """``answers`` of the record (texts, or objects with ``answer``) where it has one question; else its own answer."""
    answers = sample.extra.get("answers")
    if not alone or answers is None:
        return (question.gold,)
    texts: list[Any] = [item.get("answer") if isinstance(item, dict) else item for item in answers]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise SampleError("'answers' must be a list of texts, or of objects with 'answer'")
    return tuple(texts)


def _choices(task: TaskConfig, sample: Sample, gold: str, captions: Sequence[str]) -> tuple[tuple[str, ...], int]:
    if task.scorer == "ranking":
        others = [caption for caption in captions if caption != gold]
        drawn = random.Random(f"{task.seed}:{sample.key}").sample(others, min(task.candidates - 1, len(others)))
        chosen = tuple(sorted([gold, *drawn]))
        return chosen, chosen.index(gold)
    if task.scorer != "multiple_choice":
        return (), 0
    found = sample.extra.get("choices", sample.extra.get("options"))
    if not isinstance(found, list) or len(found) < 2:
        raise SampleError("multiple_choice needs 'choices', a list of two texts or more")
    choices = tuple(map(str, found))
    return choices, _right_choice(choices, sample.extra.get("answer", gold))


def _right_choice(choices: tuple[str, ...], answer: object) -> int:
    """Number of the right choice, which a record gives as a number from 0, a letter, or its text."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    text = str(answer).strip()
    if text in choices:
        return choices.index(text)
    letter = string.ascii_uppercase.find(text.rstrip(".").upper()) if len(text.rstrip(".")) == 1 else -1
    if 0 <= letter < len(choices):
        return letter
    raise SampleError(f"its answer {answer!r} is none of its {len(choices)} choices")


def _prompted(task: TaskConfig, sample: Sample, question: Question, choices: tuple[str, ...]) -> tuple[Turn, ...]:
    """The turns with the last one rewritten by the task's prompt; placeholders stay, before the text."""
    if not task.prompt:
        return question.turns
    last = question.turns[-1]
    marks = "".join(f"{mark}\n" for mark in _PLACEHOLDER.findall(last.text))
    listed = "\n".join(f"{string.ascii_uppercase[place]}. {text}" for place, text in enumerate(choices[:26]))
    plain = {name: value for name, value in sample.extra.items() if isinstance(value, str | int | float)}
    fields = {**plain, "question": question.text, "choices": listed}
    return (*question.turns[:-1], Turn("user", marks + fill(task.prompt, fields)))


def fill(template: str, fields: dict[str, Any]) -> str:
    """``template`` with ``{name}`` replaced by the fields; nothing but plain names is looked up.

    Raises:
        SampleError: a name that the sample does not have.
    """
    parts = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        if name not in fields or spec or conversion:
            raise SampleError(f"the task's prompt asks for {{{name}}}, which this sample does not have")
        parts.append(str(fields[name]))
    return "".join(parts)


def _digest(item: TaskItem) -> str:
    digest = hashlib.blake2b(digest_size=12)
    turns = [(turn.role, turn.text) for turn in item.question.turns]
    digest.update(json.dumps([turns, item.choices]).encode())
    for kind, files in sorted(item.question.media.items()):
        for file in files:
            data, told = (file, "") if isinstance(file, bytes) else (file.data, f"{file.clip} {file.times_s}:")
            digest.update(f"{kind}:{len(data)}:{told}".encode())
            digest.update(data)
    return digest.hexdigest()


def _conversation(record: dict[str, Any]) -> dict[str, Any]:
    """The record as one with ``conversations``; ``question`` with ``answer`` or ``answers`` becomes two turns."""
    if "conversations" in record:
        return record
    answers = record.get("answers") or [record.get("answer")]
    first = answers[0] if isinstance(answers, list) and answers else None
    first = first.get("answer") if isinstance(first, dict) else first
    if not isinstance(record.get("question"), str) or first is None:
        raise SampleError("needs 'conversations', or 'question' with 'answer' or 'answers'")
    turns = [{"from": "human", "value": record["question"]}, {"from": "gpt", "value": str(first)}]
    return {"conversations": turns}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError(f"cannot read {path}: {error.strerror}") from None
