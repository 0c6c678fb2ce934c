"""How likely the model finds every held-out caption for every held-out picture, and what follows from that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llava_scale.data.dataset import open_dataset
from llava_scale.eval.likelihood import RowMaker, caption_scores, split_caption
from llava_scale.eval.metrics import Share, rank_of, top_k

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from llava_scale.model import LlavaScaleForConditionalGeneration, LlavaScaleProcessor

MAX_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Log-likelihoods of captions given pictures, all against all.

    Attributes:
        keys: Key of each held-out sample.
        captions: Its caption.
        lengths: ``(K,)`` tokens of each caption, end marker included.
        log_likelihood: ``(K, K)`` in nats; row: picture, column: caption.
    """

    keys: tuple[str, ...]
    captions: tuple[str, ...]
    lengths: Tensor
    log_likelihood: Tensor

    @property
    def loss(self) -> float:
        """Nats per supervised token of the pictures' own captions, end markers included."""
        return -float(self.log_likelihood.diagonal().sum() / self.lengths.sum())

    @property
    def loss_with_wrong_picture(self) -> float:
        """The same with each caption read beside every picture but its own: what is known without seeing."""
        num = len(self.keys)
        others = self.log_likelihood.sum(0) - self.log_likelihood.diagonal()
        return -float((others / (num - 1)).sum() / self.lengths.sum())

    @property
    def ranks(self) -> list[int]:
        """Rank of each picture's own caption among all, 1 for the best, by log-likelihood per token."""
        return _ranks(self.log_likelihood / self.lengths)

    @property
    def corrected_ranks(self) -> list[int]:
        """The same by pointwise mutual information: log-likelihood less the caption's average over all pictures.

        A caption that is likely whatever is shown ("A dog.") then has no advantage.
        """
        typical = self.log_likelihood.logsumexp(0) - math.log(len(self.keys))
        return _ranks(self.log_likelihood - typical)

    def best(self, number: int, picture: int) -> list[str]:
        """The likeliest captions of a picture, in the order of ``corrected_ranks``."""
        typical = self.log_likelihood.logsumexp(0)
        places = (self.log_likelihood[picture] - typical).topk(min(number, len(self.keys))).indices
        return [self.captions[place] for place in places.tolist()]


def score_all(
    model: LlavaScaleForConditionalGeneration,
    processor: LlavaScaleProcessor,
    shards: str,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CaptionScores:
    """Score every caption of a packed data set for each of its pictures; captions must differ from each other."""
    dataset = open_dataset(shards)
    maker = RowMaker(dataset, processor, max_length=MAX_LENGTH)
    rows = [maker.row([number])[0] for number in range(len(dataset))]
    answers = [split_caption(row)[1] for row in rows]
    order = sorted(range(len(answers)), key=lambda place: (len(answers[place]), answers[place]))
    by_length = [answers[place] for place in order]
    scores = torch.empty(len(rows), len(rows), dtype=torch.float64)
    for place, row in enumerate(rows):
        scores[place, order] = torch.tensor(caption_scores(model, row, by_length), dtype=torch.float64)
        on_progress(place + 1, len(rows))
    samples = [dataset.sample(number) for number in range(len(dataset))]
    return CaptionScores(
        keys=tuple(sample.key for sample in samples),
        captions=tuple(sample.turns[-1].text for sample in samples),
        lengths=torch.tensor([len(answer) for answer in answers], dtype=torch.float64),
        log_likelihood=scores,
    )


def ranking_summary(scores: CaptionScores) -> dict[str, float]:
    """Top-1 and top-5 shares with their chance level and 95 % intervals, under the names of ``summary.json``."""
    num = len(scores.keys)
    summary: dict[str, float] = {"chance_top1": 1 / num, "chance_top5": min(5, num) / num, "ranking_candidates": num}
    for name, ranks in (("ranking", scores.ranks), ("ranking_corrected", scores.corrected_ranks)):
        for k in (1, 5):
            share: Share = top_k(ranks, k)
            low, high = share.interval
            summary |= {f"{name}_top{k}": share.value, f"{name}_top{k}_low": low, f"{name}_top{k}_high": high}
    return summary


def _ranks(scores: Tensor) -> list[int]:
    return [rank_of(row, place) for place, row in enumerate(scores.tolist())]
