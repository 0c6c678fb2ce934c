"""Scores of answers: exact match, shares with intervals, ranks. Pure functions, no model."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Share:
    """``correct`` out of ``total``, with its Wilson 95 % interval."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The share itself; 0.0 where ``total`` is 0."""
        return self.correct / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the share."""
        return wilson_interval(self.correct, self.total)

    def to_json(self) -> dict[str, float | int]:
        """Value, bounds and counts, as written to ``eval.json``."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "correct": self.correct, "total": self.total}


def share_of(outcomes: Sequence[bool]) -> Share:
    """Count the true entries of ``outcomes``."""
    return Share(sum(outcomes), len(outcomes))


def wilson_interval(correct: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of a share seen as ``correct`` of ``total``; (0, 1) where nothing was seen.

    Score interval of Wilson (1927): stays inside [0, 1] and keeps a width at 0 and 1, where the normal approximation
    has none.

    Raises:
        ValueError: unless ``0 <= correct <= total`` and ``0 < confidence < 1``.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"correct must lie in [0, total], got {correct} of {total}")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    centre = share + z * z / (2 * total)
    # the exact bounds at the ends are 0 and 1; rounding would leave them off by 1e-17
    low = 0.0 if correct == 0 else (centre - spread) / scale
    high = 1.0 if correct == total else (centre + spread) / scale
    return low, high


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, single spaces: what two equal answers have in common.

    Numbers keep their sign and decimal point ("-3" is not "3", "2.5" is not "25"), thousands lose their commas, and
    letters of every script stay. A text of punctuation alone is returned lower-cased and stripped.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(_keep(folded, i) for i in range(len(folded)))
    return " ".join(kept.split()) or folded.strip()


def _keep(text: str, i: int) -> str:
    """The character at ``i`` as normalisation leaves it: itself, a space, or nothing."""
    char = text[i]
    if not unicodedata.category(char).startswith("P"):
        return char
    before = text[i - 1] if i else " "
    after = text[i + 1] if i + 1 < len(text) else " "
    if char in ".,'’" and before.isalnum() and after.isalnum():
        if before.isdigit() and after.isdigit() and char in ".,":
            return char if char == "." else ""
        return "" if char in "'’" else " "
    if char == "-" and after.isdigit() and not before.isalnum():
        return char
    return " "


def exact_match(answer: str, gold: str) -> bool:
    """Whether two answers are the same after :func:`normalise_answer`."""
    return normalise_answer(answer) == normalise_answer(gold)


def blind_matches(questions: Sequence[str], golds: Sequence[str], *, min_count: int = 20) -> list[bool]:
    """Which answers a reader without eyes gets right by always giving the most frequent one to such a question.

    "Such a question" is the very same one where at least ``min_count`` of ``questions`` ask it; else those that begin
    with the same words, as many words as still leave ``min_count`` (all questions, if no word does). Answers of rare
    questions would otherwise count as known: among questions that are each asked once, every answer is the most
    frequent one. Frequencies come from ``golds`` themselves, so the share is a little too high, the more so the fewer
    questions there are. Ties go to the first answer in sorted order.
    """
    counts: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    answers = [normalise_answer(gold) for gold in golds]
    beginnings = [_beginnings(question) for question in questions]
    for prefixes, answer in zip(beginnings, answers, strict=True):
        for prefix in prefixes:
            counts[prefix][answer] += 1
    large = {prefix: _most_frequent(count) for prefix, count in counts.items() if count.total() >= min_count}
    large.setdefault((), _most_frequent(counts[()]))
    guesses = [next(large[prefix] for prefix in prefixes if prefix in large) for prefixes in beginnings]
    return [guess == answer for guess, answer in zip(guesses, answers, strict=True)]


def _beginnings(question: str) -> list[tuple[str, ...]]:
    """The whole question, then its first words, one fewer each time, down to none."""
    words = tuple(normalise_answer(question).split())
    return [(*words, "\n"), *(words[:length] for length in range(len(words), -1, -1))]


def _most_frequent(count: Counter[str]) -> str:
    return min(count, key=lambda text: (-count[text], text), default="")


def rank_of(scores: Sequence[float], own: int) -> int:
    """Rank of the entry ``own`` among ``scores``, 1 for the highest; ties and NaN count against it."""
    mine = scores[own]
    if math.isnan(mine):
        return len(scores)
    return 1 + sum(not other < mine for i, other in enumerate(scores) if i != own)


def top_k(ranks: Sequence[int], k: int) -> Share:
    """Share of ``ranks`` that are ``k`` or better."""
    return share_of([rank <= k for rank in ranks])
