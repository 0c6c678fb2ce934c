"""Run task files: every process answers its share, each answer is kept, and the scores are those of one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llava_scale.errors import SampleError
from llava_scale.eval.answer_cache import AnswerCache
from llava_scale.eval.choosing import Chooser
from llava_scale.eval.result import Example, thumbnail
from llava_scale.eval.runner import choose_examples, spread
from llava_scale.eval.scorers import Response, Scored, score_task
from llava_scale.eval.task_data import TaskItem, TaskSource, all_captions, open_source, read_items
from llava_scale.eval.task_result import TaskResult
from llava_scale.training.parallel import Ranks
from llava_scale.types import SkippedSample

if TYPE_CHECKING:
    from llava_scale.eval.task_file import TaskConfig
    from llava_scale.eval.tasks import Generate
    from llava_scale.model import LlavaScaleForConditionalGeneration, LlavaScaleProcessor

OnProgress = Callable[[str, int, int], None]
"""Called with the name of the task, the samples of this process that are done, and all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRunner:
    """Runs tasks with one model.

    Attributes:
        model: In evaluation mode.
        processor: Its processor.
        generate: Called with the longest answer in tokens; returns how questions are answered.
        digest: Of the checkpoint; what cached answers are found by.
        cache: Folder of answers; None keeps none.
        ranks: All processes that share the work, each of which calls ``run`` for the same tasks.
        on_progress: Hears how far it is.
    """

    model: LlavaScaleForConditionalGeneration
    processor: LlavaScaleProcessor
    generate: Callable[[int], Generate]
    digest: str = ""
    cache: Path | None = None
    ranks: Ranks = field(default_factory=Ranks)
    on_progress: OnProgress = lambda name, done, total: None

    def run(self, task: TaskConfig) -> TaskResult:
        """Answer and score a task; every process gets the whole result, the pictures only the first.

        Raises:
            SampleError: no sample can be used; names the first.
            ConfigError, ShardError: the data cannot be read, or holds nothing for this task.
        """
        start = time.perf_counter()
        source = open_source(task)
        numbers = spread(len(source), task.limit)
        share = _Share(self, task, source, numbers)
        share.answer()
        found = [pair for pairs in self.ranks.gather(share.answered) for pair in pairs]
        found.sort(key=lambda pair: (pair[0].number, pair[0].place))
        skipped = [item for items in self.ranks.gather(share.skipped) for item in items]
        num_cached = self.ranks.total(share.num_cached)
        if not found:
            reason = f"this one because: {skipped[0].reason}" if skipped else f"none has {task.where}"
            where = skipped[0] if skipped else SkippedSample(shard=task.data, key="", reason="")
            raise SampleError(f"task {task.name}: no sample can be used, {reason}", shard=where.shard, key=where.key)
        items, responses = [pair[0] for pair in found], [pair[1] for pair in found]
        scored = score_task(task, items, responses)
        return TaskResult(
            task=task,
            num_samples=len({item.number for item in items}),
            num_cached=num_cached,
            items=items,
            responses=responses,
            scored=scored,
            examples=self._examples(task, source, items, scored) if self.ranks.is_first else (),
            skipped=tuple(sorted(skipped, key=lambda item: (item.shard, item.key))),
            seconds=time.perf_counter() - start,
        )

    def _examples(
        self, task: TaskConfig, source: TaskSource, items: Sequence[TaskItem], scored: Scored
    ) -> tuple[Example, ...]:
        """Some answers with their pictures, wrong ones favoured."""
        correct = [points >= 1.0 for points in scored.points]
        examples = []
        for place in choose_examples(correct, task.examples):
            item = items[place]
            sample = next(iter(source.samples([item.number])))
            files = () if isinstance(sample, SampleError) else sample.media.get("image", ())
            small = [thumbnail(data, max_pixels=self.processor.max_image_pixels) for _, data in files]
            gold = item.choices[item.answer] if item.choices else " | ".join(dict.fromkeys(item.references))
            examples.append(
                Example(
                    key=item.key,
                    task=f"{scored.points[place]:.2f} points",
                    modality=item.question.modality,
                    question=item.question.text,
                    gold=gold,
                    answer=scored.answers[place],
                    correct=correct[place],
                    pictures=tuple(data for data in small if data),
                )
            )
        return tuple(examples)


class _Share:
    """What one process answers of a task."""

    def __init__(self, runner: TaskRunner, task: TaskConfig, source: TaskSource, numbers: Sequence[int]) -> None:
        self._runner, self._task, self._source = runner, task, source
        self._captions = all_captions(task, source, numbers) if task.scorer == "ranking" else []
        self._numbers = numbers[runner.ranks.rank :: runner.ranks.size]
        self._cache = AnswerCache(runner.cache, runner.digest, task, runner.ranks.rank)
        self.answered: list[tuple[TaskItem, Response]] = []
        self.skipped: list[SkippedSample] = []
        self.num_cached = 0

    def answer(self) -> None:
        """Answer everything that is not known yet."""
        done, runner, task = 0, self._runner, self._task
        ask = self._write if task.is_generated else self._choose
        try:
            for items in read_items(task, self._source, self._numbers, self._captions):
                runner.on_progress(task.name, done, len(self._numbers))
                new: list[TaskItem] = []
                for item in items:
                    if isinstance(item, SampleError):
                        self._skip(item.shard, item.key, item.reason)
                        continue
                    known = self._cache.get(item)
                    if known is None:
                        new.append(item)
                    else:
                        self.num_cached += 1
                        self.answered.append((item.light(), known))
                ask(new)
                done = min(done + _CHUNK, len(self._numbers))
            runner.on_progress(task.name, len(self._numbers), len(self._numbers))
        finally:
            self._cache.close()

    def _write(self, items: Sequence[TaskItem]) -> None:
        generate = self._runner.generate(self._task.max_new_tokens)
        for start in range(0, len(items), _ASKED):
            asked = items[start : start + _ASKED]
            for item, answer in zip(asked, generate([item.question for item in asked]), strict=True):
                if isinstance(answer, SampleError):
                    self._skip(answer.shard, answer.key or item.key, answer.reason)
                else:
                    self._keep(item, Response(text=answer))

    def _choose(self, items: Sequence[TaskItem]) -> None:
        choose = Chooser(self._runner.model, self._runner.processor, with_letters=self._task.answer_with == "letter")
        for item in items:
            try:
                self._keep(item, choose(item))
            except SampleError as error:
                self._skip(error.shard, error.key or item.key, error.reason)

    def _keep(self, item: TaskItem, response: Response) -> None:
        self._cache.add(item, response)
        self.answered.append((item.light(), response))

    def _skip(self, shard: str, key: str, reason: str) -> None:
        self.skipped.append(SkippedSample(shard=shard or self._task.data, key=key, reason=reason))


_CHUNK = 256  # as read_items reads them
_ASKED = 64  # questions between two writes of the cache
