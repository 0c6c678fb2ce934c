"""Scores of one answer against its references, as the benchmarks of vision and language define them. No model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 (a list would be a hundred lines)
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {**{word: str(number) for number, word in enumerate(_NUMBERS)}, "none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_NOT_A_WORD = re.compile(r"[^\w\s']|_")
_LONGEST_GRAM = 4
_CIDER_SIGMA = 6.0


def vqa_normalise(text: str) -> str:
    """An answer as VQA's evaluation compares it.

    Lower case; punctuation out (as a space, unless it stands beside one or numbers have commas); periods out but in
    numbers; number words as digits; articles out; apostrophes of contractions in.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    numbered = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or numbered else " ")
    words = [_DIGITS.get(word, word) for word in _LONE_PERIOD.sub("", cleaned).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Soft accuracy of VQA (Antol et al., arXiv:1505.00468), in [0, 1].

    For each person left out, an answer that three of the others gave counts fully: ``min(1, matches / 3)``; the mean
    over all who are left out. A single reference must match.
    """
    own = vqa_normalise(answer)
    matches = [vqa_normalise(reference) == own for reference in references]
    if len(matches) == 1:
        return float(matches[0])
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def anls(answer: str, references: Sequence[str], *, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one answer (Biten et al., arXiv:1905.13648), in [0, 1].

    The best of the references; similarities below ``threshold`` count as 0. Upper and lower case are the same, white
    space is joined.
    """
    own = " ".join(answer.casefold().split())
    best = max((_similarity(own, " ".join(reference.casefold().split())) for reference in references), default=0.0)
    return best if best >= threshold else 0.0


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions and replacements that turn ``one`` into ``other`` (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, char in enumerate(one, start=1):
        before, row[0] = row[0], i
        for j, wanted in enumerate(other, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (char != wanted))
    return row[-1]


def caption_words(text: str) -> list[str]:
    """Words of a caption in lower case without punctuation: close to the Penn tokenizer of the COCO evaluation."""
    return _NOT_A_WORD.sub(" ", text.lower()).replace("n't", " n't").replace("'s", " 's").split()


def cider_d(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each answer (Vedantam et al., arXiv:1411.5726), 0 to 10; the corpus score is their mean.

    tf-idf vectors of 1- to 4-grams, clipped to the reference, with a Gaussian penalty (sigma 6) on the difference of
    lengths, times 10. Document frequencies come from ``references``, so single samples cannot be scored: with one
    sample every idf is 0.
    """
    cooked = [[_grams(caption_words(text)) for text in group] for group in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for group in cooked:
        frequency.update({gram for grams, _ in group for gram in grams})
    log_total = math.log(max(len(cooked), 1))
    scores = []
    for answer, group in zip(answers, cooked, strict=True):
        own = _vector(*_grams(caption_words(answer)), frequency, log_total)
        similar = [_cider_similarity(own, _vector(*grams, frequency, log_total)) for grams in group]
        scores.append(10.0 * sum(similar) / max(len(similar), 1))
    return scores


_Vector = tuple[list[dict[tuple[str, ...], float]], list[float], int]


def _grams(words: Sequence[str]) -> tuple[Counter[tuple[str, ...]], int]:
    """Counts of 1- to 4-grams, and the number of words."""
    counts: Counter[tuple[str, ...]] = Counter()
    for length in range(1, _LONGEST_GRAM + 1):
        counts.update(tuple(words[start : start + length]) for start in range(len(words) - length + 1))
    return counts, len(words)


def _vector(counts: Counter[tuple[str, ...]], _: int, frequency: Counter[tuple[str, ...]], log_total: float) -> _Vector:
    weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(_LONGEST_GRAM)]
    for gram, count in counts.items():
        weights[len(gram) - 1][gram] = count * (log_total - math.log(max(1, frequency[gram])))
    norms = [math.sqrt(sum(value * value for value in part.values())) for part in weights]
    # the reference implementation takes the number of bigrams for the length
    return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2)


def _cider_similarity(own: _Vector, reference: _Vector) -> float:
    penalty = math.exp(-((own[2] - reference[2]) ** 2) / (2 * _CIDER_SIGMA**2))
    total = 0.0
    for part, other, norm, other_norm in zip(own[0], reference[0], own[1], reference[1], strict=True):
        shared = sum(min(value, other[gram]) * other[gram] for gram, value in part.items() if gram in other)
        if norm and other_norm:
            total += shared / (norm * other_norm) * penalty
    return total / _LONGEST_GRAM


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1.0 - edit_distance(one, other) / longest if longest else 1.0
