"""Evaluate a model on a packed data set."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from llava_scale.errors import ConfigError, SampleError
from llava_scale.eval.likelihood import CaptionRanking, HeldOutLoss, RowMaker, rank_captions
from llava_scale.eval.metrics import Share, blind_matches, exact_match, share_of
from llava_scale.eval.result import EvalResult, Example, film_strip, thumbnail
from llava_scale.eval.tasks import MODALITIES, BlindGenerate, Generate, Question, questions_of
from llava_scale.training.parallel import Ranks
from llava_scale.types import SkippedSample

if TYPE_CHECKING:
    from llava_scale.data.dataset import ShardedDataset
    from llava_scale.model import LlavaScaleForConditionalGeneration, LlavaScaleProcessor
    from llava_scale.types import Sample

OnProgress = Callable[[str, int, int], None]
"""Called with the part of the evaluation, what is done of it, and all of it."""

_CHUNK = 256  # samples read, scored and asked together
_ROW_SAMPLES = 16  # samples whose loss is computed together
_UNLIMITED = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """What is evaluated.

    Attributes:
        limit: Most samples, spread evenly over the data set; 0 takes all.
        blind_model: Also ask with plain pictures and silent sounds.
        shuffle_frames: Also ask with the frames of videos in another order.
        ranking: Captions to rank among; 0 ranks none.
        ranking_task: Samples whose ``task`` is this take part in the ranking.
        num_examples: Answers to keep with their pictures.
        seed: Of the draw of captions.
    """

    limit: int = 0
    blind_model: bool = True
    shuffle_frames: bool = False
    ranking: int = 0
    ranking_task: str = "caption"
    num_examples: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit < 0 or self.num_examples < 0:
            raise ConfigError(f"limit and num_examples must be 0 or more, got {self.limit} and {self.num_examples}")
        if self.ranking < 0 or self.ranking == 1:
            raise ConfigError(f"ranking must be 0 (none) or 2 and more captions, got {self.ranking}")


def evaluate(
    model: LlavaScaleForConditionalGeneration,
    processor: LlavaScaleProcessor,
    dataset: ShardedDataset,
    generate: Generate,
    *,
    checkpoint: str = "",
    settings: EvalSettings | None = None,
    ranks: Ranks | None = None,
    on_progress: OnProgress = lambda part, done, total: None,
) -> EvalResult:
    """Held-out loss, exact match beside blind scores, and caption ranking.

    Every answer of a conversation is asked for, with the true history before it. The model is put into evaluation mode
    and back. Every process gets the whole result, the examples only the first.

    Args:
        model: What is evaluated.
        processor: Its processor.
        dataset: Held-out samples.
        generate: Answers questions with this model; greedy, so that results repeat.
        checkpoint: Name of the model in the result.
        settings: What is evaluated.
        ranks: The processes that share the samples, each of which calls this; None is this one alone.
        on_progress: Hears how far this process is.

    Raises:
        SampleError: no sample can be used; names the first.
        ConfigError: ranking was asked for and there are not two captions.
    """
    options = settings or EvalSettings()
    was_training = model.training
    model.eval()
    try:
        run = _Evaluation(model, processor, dataset, generate, options, ranks or Ranks(), on_progress)
        run.read_all()
        ranking = run.rank() if options.ranking else None
        return run.result(checkpoint, ranking)
    finally:
        model.train(was_training)


@dataclass(slots=True)
class _Answered:
    """What came of a question; its media are let go."""

    question: Question
    modality: str
    answer: str
    blind_answer: str | None
    shuffled_answer: str | None

    @classmethod
    def of(cls, question: Question, answer: str, blind: str | None, shuffled: str | None) -> _Answered:
        return cls(replace(question, media={}), question.modality, answer, blind, shuffled)

    @property
    def correct(self) -> bool:
        return exact_match(self.answer, self.question.gold)


@dataclass(slots=True)
class _Evaluation:
    model: LlavaScaleForConditionalGeneration
    processor: LlavaScaleProcessor
    dataset: ShardedDataset
    generate: Generate
    settings: EvalSettings
    ranks: Ranks
    on_progress: OnProgress
    answered: list[_Answered] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)
    captioned: list[int] = field(default_factory=list)
    num_samples: int = 0
    loss: HeldOutLoss = field(init=False)
    rows: RowMaker = field(init=False)
    blind: BlindGenerate = field(init=False)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        self.loss = HeldOutLoss(self.model)
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        self.rows = RowMaker(self.dataset, self.processor, max_length=limit or _UNLIMITED)
        transform = self.processor.image_transform
        self.blind = BlindGenerate(self.generate, colour=transform.background, size=transform.size)

    def read_all(self) -> None:
        """Loss and answers of every chosen sample."""
        chosen = spread(len(self.dataset), self.settings.limit)[self.ranks.rank :: self.ranks.size]
        for start in range(0, len(chosen), _CHUNK):
            numbers = chosen[start : start + _CHUNK]
            self.on_progress("samples", start, len(chosen))
            samples = self._usable(numbers)
            self._ask([question for number, sample in samples for question in questions_of(sample, number)])
        self.on_progress("samples", len(chosen), len(chosen))
        self._join()
        if not self.num_samples:
            first = self.skipped[0]
            raise SampleError(
                f"no sample of {len(self.skipped):,} can be used, this one because: {first.reason}",
                shard=first.shard,
                key=first.key,
            )

    def _join(self) -> None:
        """Put together what the processes found, in the order of the samples."""
        self.loss.add_up(self.ranks)
        self.num_samples = self.ranks.total(self.num_samples)
        self.answered = [item for items in self.ranks.gather(self.answered) for item in items]
        self.answered.sort(key=lambda item: item.question.number)
        self.skipped = [item for items in self.ranks.gather(self.skipped) for item in items]
        self.skipped.sort(key=lambda item: (item.shard, item.key))
        for seconds in self.ranks.gather(dict(self.seconds)):
            for part, spent in seconds.items():
                self.seconds[part] = max(self.seconds[part], spent)

    def _usable(self, numbers: Sequence[int]) -> list[tuple[int, Sample]]:
        """Add the loss of samples, and return those that the model can take."""
        reasons: list[SkippedSample | None] = []
        with self._timed("loss"):
            for start in range(0, len(numbers), _ROW_SAMPLES):
                row, skipped = self.rows.row(numbers[start : start + _ROW_SAMPLES])
                self.loss.add(row)
                reasons += skipped
        self.skipped += [reason for reason in reasons if reason is not None]
        kept = [number for number, reason in zip(numbers, reasons, strict=True) if reason is None]
        self.num_samples += len(kept)
        usable = []
        for number, sample in zip(kept, self.dataset.samples(kept), strict=True):
            assert not isinstance(sample, SampleError)  # it is in a row already
            usable.append((number, sample))
            if sample.media.get("image") and sample.extra.get("task") == self.settings.ranking_task:
                self.captioned.append(number)
        return usable

    def _ask(self, questions: Sequence[Question]) -> None:
        with self._timed("answers"):
            answers = self.generate(questions)
        blind = self._ask_again("blind answers", questions, self.blind) if self.settings.blind_model else {}
        moving = [question for question in questions if question.media.get("video")]
        shuffled = self._ask_again("shuffled frames", moving, self._shuffled) if self.settings.shuffle_frames else {}
        for question, answer in zip(questions, answers, strict=True):
            if isinstance(answer, SampleError):
                self._skip(question.number, answer)
                continue
            again = blind.get(id(question)), shuffled.get(id(question))
            self.answered.append(_Answered.of(question, answer, *again))

    def _ask_again(self, part: str, questions: Sequence[Question], ask: Generate) -> dict[int, str]:
        """Answers to the questions with media, by the identity of the question; "" where there is none."""
        with_media = [question for question in questions if question.modality != "text"]
        if not with_media:
            return {}
        with self._timed(part):
            found = zip(with_media, ask(with_media), strict=True)
            return {id(question): answer if isinstance(answer, str) else "" for question, answer in found}

    def _shuffled(self, questions: Sequence[Question]) -> Sequence[str | SampleError]:
        return self.generate([replace(question, change="shuffle") for question in questions])

    def _skip(self, number: int, error: SampleError) -> None:
        shard = error.shard or self.dataset.shard_name(self.dataset.locate(number)[0])
        key = error.key or self.dataset.key(number)
        self.skipped.append(SkippedSample(shard=shard, key=key, reason=error.reason))

    def rank(self) -> CaptionRanking:
        """Rank the captions that were met."""
        task = self.settings.ranking_task
        with self._timed("ranking"):
            try:
                return rank_captions(
                    self.model,
                    [self.rows.row([number])[0] for number in self.captioned],
                    num_candidates=self.settings.ranking,
                    seed=self.settings.seed,
                    ranks=self.ranks,
                    on_progress=lambda done, total: self.on_progress("ranking", done, total),
                )
            except ValueError:
                num_captioned = self.ranks.total(len(self.captioned))
                found = sorted({item.question.task or "(none)" for item in self.answered})
                raise ConfigError(
                    f"ranking needs two different captions or more, but {num_captioned} samples with pictures "
                    f"have the task {task!r}; tasks here: {', '.join(found)} (choose with --ranking-task)"
                ) from None

    def result(self, checkpoint: str, ranking: CaptionRanking | None) -> EvalResult:
        """Everything that was found."""
        tasks = [item.question.task for item in self.answered]
        modalities = [item.modality for item in self.answered]
        correct = {place: item.correct for place, item in enumerate(self.answered)}
        seen = {place: item for place, item in enumerate(self.answered) if item.modality != "text"}
        majority = _blind(seen)
        guessed = _matches({place: (item.blind_answer, item.question.gold) for place, item in seen.items()})
        shuffled = _matches({place: (item.shuffled_answer, item.question.gold) for place, item in seen.items()})
        return EvalResult(
            checkpoint=checkpoint,
            data=self.dataset.path,
            num_samples=self.num_samples,
            num_questions=len(self.answered),
            loss=self.loss.value,
            num_supervised=self.loss.num_tokens,
            exact_match={"overall": share_of(list(correct.values())), **_shares(correct, modalities, MODALITIES)},
            by_task=_shares(correct, tasks),
            blind=_shares(majority, modalities, MODALITIES),
            blind_by_task=_shares(majority, tasks),
            blind_model=_shares(guessed, modalities, MODALITIES),
            blind_model_by_task=_shares(guessed, tasks),
            shuffled_frames=_shares(shuffled, modalities, MODALITIES),
            shuffled_frames_by_task=_shares(shuffled, tasks),
            ranking=ranking,
            examples=tuple(self._examples()) if self.ranks.is_first else (),
            skipped=tuple(self.skipped),
            seconds=dict(self.seconds),
        )

    def _examples(self) -> Iterator[Example]:
        """Kept answers with their pictures: half of them wrong as far as there are enough, each half spread evenly."""
        places = choose_examples([item.correct for item in self.answered], self.settings.num_examples)
        transform = self.processor.image_transform
        for place in places:
            item = self.answered[place]
            question = item.question
            sample = self.dataset.sample(question.number)
            asked = next(other for other in questions_of(sample, question.number) if other.turns == question.turns)
            shown = [data for data in asked.media.get("image", ()) if isinstance(data, bytes)]
            small = [thumbnail(data, max_pixels=transform.max_pixels) for data in shown]
            small += [film_strip(video, self.processor.video_transform) for video in asked.media.get("video", ())]
            yield Example(
                key=question.key,
                task=question.task,
                modality=item.modality,
                question=question.text,
                gold=question.gold,
                answer=item.answer,
                correct=item.correct,
                pictures=tuple(data for data in small if data),
            )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.seconds[part] += time.perf_counter() - start


def spread(total: int, limit: int) -> list[int]:
    """``limit`` of the numbers below ``total``, evenly apart; all of them where ``limit`` is 0 or larger."""
    if not limit or limit >= total:
        return list(range(total))
    return [place * total // limit for place in range(limit)]


def choose_examples(correct: Sequence[bool], number: int) -> list[int]:
    """Places of ``number`` answers: up to half of them wrong, more where right ones are few; in rising order."""
    wrong = [place for place, right in enumerate(correct) if not right]
    right = [place for place, is_right in enumerate(correct) if is_right]
    num_wrong = min(len(wrong), max(number // 2, number - len(right)))
    num_right = min(len(right), number - num_wrong)
    taken = [wrong[place] for place in spread(len(wrong), num_wrong)] if num_wrong else []
    taken += [right[place] for place in spread(len(right), num_right)] if num_right else []
    return sorted(taken)


def _matches(answers: dict[int, tuple[str | None, str]]) -> dict[int, bool]:
    """Which of the answers that were given are right."""
    return {place: exact_match(answer, gold) for place, (answer, gold) in answers.items() if answer is not None}


def _blind(answered: dict[int, _Answered]) -> dict[int, bool]:
    """Which answers are the most frequent ones to such questions, counted in each modality by itself."""
    outcomes: dict[int, bool] = {}
    for modality in MODALITIES:
        members = {place: item.question for place, item in answered.items() if item.modality == modality}
        questions = [question.text for question in members.values()]
        golds = [question.gold for question in members.values()]
        outcomes.update(zip(members, blind_matches(questions, golds), strict=True))
    return outcomes


def _shares(outcomes: dict[int, bool], groups: Sequence[str], order: Sequence[str] = ()) -> dict[str, Share]:
    """Share of the outcomes in each group, groups in ``order`` or sorted; nameless ones are left out."""
    members: defaultdict[str, list[bool]] = defaultdict(list)
    for place, outcome in outcomes.items():
        members[groups[place]].append(outcome)
    names = [name for name in order if name in members] if order else sorted(members)
    return {name: share_of(members[name]) for name in names if name}
