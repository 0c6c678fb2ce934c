"""Answers of a whole task to scores with intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_scale.errors import MissingExtraError
from llava_scale.eval.metrics import exact_match, rank_of, share_of
from llava_scale.eval.own_scorers import points_of
from llava_scale.eval.text_metrics import anls, cider_d, vqa_accuracy

if TYPE_CHECKING:
    from llava_scale.eval.task_data import TaskItem
    from llava_scale.eval.task_file import TaskConfig

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A mean with its 95 % interval.

    Attributes:
        value: The score.
        low: Lower bound.
        high: Upper bound.
        num_items: Answers it was computed from.
        method: ``wilson`` for shares, ``bootstrap`` for other means.
    """

    value: float
    low: float
    high: float
    num_items: int
    method: str

    def to_json(self) -> dict[str, Any]:
        """As written to ``tasks.json``."""
        return {name: getattr(self, name) for name in ("value", "low", "high", "num_items", "method")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What the model said to an item: a text, or the log-likelihood of each choice.

    Attributes:
        text: Written answer.
        scores: Log-likelihood of each choice as a whole.
        lengths: Tokens of each choice.
    """

    text: str = ""
    scores: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Scores of a task, and of each answer in it.

    Attributes:
        scores: By name of the metric, the task's own first.
        points: Of each answer, 1 for a fully right one (CIDEr: up to 10).
        answers: Each answer as text.
    """

    scores: dict[str, Score]
    points: list[float]
    answers: list[str]


def score_task(task: TaskConfig, items: Sequence[TaskItem], responses: Sequence[Response]) -> Scored:
    """Score all answers of a task.

    Raises:
        MissingExtraError: sacrebleu is not installed (``bleu``).
        ConfigError: a scorer by import path is missing, or does not return what it should.
    """
    if not task.is_generated:
        return _score_choices(task, items, responses)
    answers = [response.text for response in responses]
    references = [item.references for item in items]
    if ":" in task.scorer:
        points = points_of(task.scorer, answers, references)
        name = task.scorer.rpartition(":")[2]
        return Scored(scores={name: mean_score(points)}, points=points, answers=answers)
    return _GENERATED[task.scorer](answers, references)


def mean_score(values: Sequence[float], *, seed: int = 0) -> Score:
    """Mean of ``values`` with a bootstrap percentile interval (Efron 1979), the same for the same values."""
    if not values:
        return Score(value=0.0, low=0.0, high=0.0, num_items=0, method="bootstrap")
    rng, number = random.Random(seed), len(values)
    means = sorted(sum(rng.choices(values, k=number)) / number for _ in range(_RESAMPLES))
    low, high = means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1]
    return Score(value=sum(values) / number, low=low, high=high, num_items=number, method="bootstrap")


def share_score(outcomes: Sequence[bool]) -> Score:
    """Share of true ``outcomes`` with its Wilson interval."""
    share = share_of(outcomes)
    low, high = share.interval
    return Score(value=share.value, low=low, high=high, num_items=share.total, method="wilson")


def _exact(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    right = [
        any(exact_match(answer, gold) for gold in golds) for answer, golds in zip(answers, references, strict=True)
    ]
    return Scored(
        scores={"exact_match": share_score(right)}, points=[float(value) for value in right], answers=list(answers)
    )


def _vqa(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    points = [vqa_accuracy(answer, golds) for answer, golds in zip(answers, references, strict=True)]
    return Scored(scores={"vqa_accuracy": mean_score(points)}, points=points, answers=list(answers))


def _anls(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    points = [anls(answer, golds) for answer, golds in zip(answers, references, strict=True)]
    return Scored(scores={"anls": mean_score(points)}, points=points, answers=list(answers))


def _cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    points = cider_d(answers, references)
    return Scored(scores={"cider": mean_score(points)}, points=points, answers=list(answers))


def _bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    """Corpus BLEU (0 to 100) of sacrebleu with its bootstrap; points are sentence BLEU over 100."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise MissingExtraError("sacrebleu", "eval") from None
    most = max((len(golds) for golds in references), default=0)
    streams: Any = [[golds[number] if number < len(golds) else None for golds in references] for number in range(most)]
    sentence = BLEU(effective_order=True)
    points = [
        sentence.sentence_score(answer, list(golds)).score / 100
        for answer, golds in zip(answers, references, strict=True)
    ]
    if not answers:
        return Scored(scores={"bleu": mean_score([])}, points=[], answers=[])
    whole = BLEU().corpus_score(list(answers), streams)
    rng, number = random.Random(0), len(answers)
    drawn = []
    for _ in range(_RESAMPLES // 5):
        places = rng.choices(range(number), k=number)
        sample: Any = [[stream[place] for place in places] for stream in streams]
        drawn.append(BLEU().corpus_score([answers[place] for place in places], sample).score)
    drawn.sort()
    low, high = drawn[int(0.025 * len(drawn))], drawn[int(0.975 * len(drawn)) - 1]
    score = Score(value=whole.score, low=low, high=high, num_items=number, method="bootstrap")
    return Scored(scores={"bleu": score}, points=points, answers=list(answers))


_GENERATED: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], Scored]] = {
    "exact_match": _exact,
    "vqa_accuracy": _vqa,
    "anls": _anls,
    "cider": _cider,
    "bleu": _bleu,
}


def _score_choices(task: TaskConfig, items: Sequence[TaskItem], responses: Sequence[Response]) -> Scored:
    """Whether the right choice is the likeliest; for ``ranking`` also among the first five, and the chance of both."""
    ranks, answers, num_choices = [], [], []
    for item, response in zip(items, responses, strict=True):
        values = list(response.scores)
        if task.normalise == "mean":
            values = [value / length for value, length in zip(values, response.lengths, strict=True)]
        ranks.append(rank_of(values, item.answer))
        finite = [-math.inf if math.isnan(value) else value for value in values]
        answers.append(item.choices[finite.index(max(finite))])
        num_choices.append(len(values))
    first = [rank == 1 for rank in ranks]
    scores = {("accuracy" if task.scorer == "multiple_choice" else "top1"): share_score(first)}
    if task.scorer == "ranking":
        scores["top5"] = share_score([rank <= 5 for rank in ranks])
    chance = [1 / number for number in num_choices]
    value = sum(chance) / len(chance) if chance else 0.0
    scores["chance"] = Score(value=value, low=value, high=value, num_items=len(chance), method="exact")
    return Scored(scores=scores, points=[float(value) for value in first], answers=answers)
