"""What the model finds likely: held-out loss, and captions ranked by likelihood for a picture.

Legend: ``B`` captions, ``L`` tokens of a caption, ``V`` vocabulary.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llava_scale.data.collate import RowBuilder
from llava_scale.data.planner import PlannedSample, RowPlan
from llava_scale.eval.metrics import Share, rank_of, top_k
from llava_scale.model import row_inputs
from llava_scale.model.attention import PACKED
from llava_scale.training.parallel import Ranks
from llava_scale.types import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from llava_scale.data.dataset import ShardedDataset
    from llava_scale.model import LlavaScaleForConditionalGeneration, LlavaScaleProcessor
    from llava_scale.types import PackedRow, SkippedSample

_MOST_SCORES = 1 << 26  # floats of logits held at once


class RowMaker:
    """Samples of one data set as packed rows.

    Args:
        dataset: Where they come from.
        processor: Of the model.
        max_length: Longest sample in tokens.
    """

    def __init__(self, dataset: ShardedDataset, processor: LlavaScaleProcessor, *, max_length: int) -> None:
        self._builder = RowBuilder(
            datasets=[dataset],
            encoder=processor.chat_encoder,
            counter=processor.token_counter,
            transforms=processor.media_transforms,
            row_length=max_length,
        )

    def row(self, numbers: Sequence[int]) -> tuple[PackedRow, list[SkippedSample | None]]:
        """Lay samples by their numbers into one row; with why each of them is not in it, or None if it is.

        Raises:
            ShardError: a shard cannot be read.
        """
        plan = RowPlan(row=0, step=None, samples=tuple(PlannedSample(0, number, 0) for number in numbers))
        built = self._builder.build(plan)
        return built.row, [outcome.skipped for outcome in built.outcomes]


class HeldOutLoss:
    """Mean loss over the supervised tokens of many rows, added one at a time.

    Attributes:
        num_tokens: Supervised tokens so far.
    """

    def __init__(self, model: LlavaScaleForConditionalGeneration) -> None:
        self._model = model
        self._sum = 0.0
        self.num_tokens = 0

    @property
    def value(self) -> float | None:
        """Nats per supervised token; None before the first."""
        return self._sum / self.num_tokens if self.num_tokens else None

    @torch.no_grad()
    def add(self, row: PackedRow) -> None:
        """Count the samples of a row."""
        if not row.num_supervised:
            return
        output = self._model(**row_inputs(row, device=self._model.device), num_items_in_batch=1)
        self._sum += float(output.loss)
        self.num_tokens += row.num_supervised

    def add_up(self, ranks: Ranks) -> None:
        """Let every process have the loss over what all of them counted."""
        self._sum, num_tokens = ranks.totals([self._sum, self.num_tokens])
        self.num_tokens = int(num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRanking:
    """How often a picture's own caption is the likeliest among others.

    Attributes:
        num_samples: Pictures.
        num_candidates: Captions each was compared with, its own included.
        top1: By mean log-likelihood per token.
        top5: As ``top1``, among the first five.
        sum_top1: By the log-likelihood of the whole caption.
        sum_top5: As ``sum_top1``, among the first five.
    """

    num_samples: int
    num_candidates: int
    top1: Share
    top5: Share
    sum_top1: Share
    sum_top5: Share

    def chance(self, k: int) -> float:
        """Share that guessing would put among the first ``k``."""
        return min(k, self.num_candidates) / self.num_candidates

    def to_json(self) -> dict[str, Any]:
        """As written to ``eval.json``."""
        return {
            "num_samples": self.num_samples,
            "num_candidates": self.num_candidates,
            **{name: getattr(self, name).to_json() for name in ("top1", "top5", "sum_top1", "sum_top5")},
            "chance_top1": self.chance(1),
            "chance_top5": self.chance(5),
        }


def rank_captions(
    model: LlavaScaleForConditionalGeneration,
    rows: Sequence[PackedRow],
    *,
    num_candidates: int,
    seed: int = 0,
    ranks: Ranks | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CaptionRanking:
    """Rank each sample's own answer among the answers of the others.

    The picture and the prompt go through the model once a sample; every caption continues from there.

    Args:
        model: In evaluation mode.
        rows: Each holds one sample, whose first answer is its caption. Equal captions count as one candidate. Of
            several processes each has its own rows, and their captions are candidates for all.
        num_candidates: Captions to compare, own included: all there are, or the own one and a draw of the others.
        seed: Of the draw.
        ranks: The processes that share the samples; None is this one alone.
        on_progress: Called with the samples done and the samples of this process.

    Raises:
        ValueError: fewer than two different captions.
    """
    ranks = ranks or Ranks()
    captions = [split_caption(row)[1] for row in rows]
    distinct = sorted(set().union(*ranks.gather(captions)), key=lambda caption: (len(caption), caption))
    if len(distinct) < 2 or num_candidates < 2:
        raise ValueError(f"ranking needs two different captions or more, got {min(len(distinct), num_candidates)}")
    placed: list[tuple[int, int]] = []
    for done, (row, own) in enumerate(zip(rows, captions, strict=True)):
        chosen = _candidates(distinct, own, num_candidates, random.Random(f"{seed}:{row.keys[0]}"))
        totals = caption_scores(model, row, chosen)
        own_place = chosen.index(own)
        means = [total / len(caption) for total, caption in zip(totals, chosen, strict=True)]
        placed.append((rank_of(means, own_place), rank_of(totals, own_place)))
        on_progress(done + 1, len(rows))
    mean_ranks, sum_ranks = zip(*(pair for pairs in ranks.gather(placed) for pair in pairs), strict=True)
    return CaptionRanking(
        num_samples=len(mean_ranks),
        num_candidates=min(num_candidates, len(distinct)),
        top1=top_k(mean_ranks, 1),
        top5=top_k(mean_ranks, 5),
        sum_top1=top_k(sum_ranks, 1),
        sum_top5=top_k(sum_ranks, 5),
    )


@torch.no_grad()
def caption_scores(
    model: LlavaScaleForConditionalGeneration, row: PackedRow, captions: Sequence[tuple[int, ...]]
) -> list[float]:
    """Log-likelihood of each caption (token ids, end marker included) after the prompt and pictures of ``row``."""
    prompt, _ = split_caption(row)
    inputs: dict[str, Any] = {"input_ids": torch.tensor([prompt], device=model.device)}
    if row.pixel_values is not None:
        inputs["pixel_values"] = row.pixel_values.to(model.device)
    start = model(**inputs, use_cache=True, logits_to_keep=1)
    first = start.logits[0, -1].float().log_softmax(-1)
    scores: list[float] = []
    for group in _groups(captions, first.shape[-1]):
        total = first[torch.tensor([caption[0] for caption in group], device=first.device)]
        if len(group[-1]) > 1:
            total = total + _continued(model, start.past_key_values, group)
        scores += total.tolist()
    return scores


def _continued(model: LlavaScaleForConditionalGeneration, cache: Any, group: Sequence[tuple[int, ...]]) -> Tensor:
    """Log-likelihood ``(B,)`` of what follows the first token of each caption, from the cache of the prompt."""
    if _attends_to_all(model):
        return _continued_as_tree(model, copy.deepcopy(cache), group)
    longest = max(map(len, group))
    padded_BL = torch.tensor([[*caption, *[0] * (longest - len(caption))] for caption in group], device=model.device)
    lengths = torch.tensor([len(caption) for caption in group], device=model.device)
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(len(group))
    # no mask: padding stands behind everything that is looked at
    logits_BLV = model(input_ids=padded_BL[:, :-1], past_key_values=copied, use_cache=True).logits.float()
    chosen_BL = logits_BLV.gather(-1, padded_BL[:, 1:, None]).squeeze(-1) - logits_BLV.logsumexp(-1)
    is_token = torch.arange(1, longest, device=model.device) < lengths[:, None]
    return torch.where(is_token, chosen_BL, 0.0).sum(1)


def _attends_to_all(model: LlavaScaleForConditionalGeneration) -> bool:
    """Whether each layer of the language model is plain attention that takes any mask and has no window."""
    config = model.config.text_config
    kinds = getattr(config, "layer_types", None)
    unlimited = set(kinds) == {"full_attention"} if kinds else getattr(config, "sliding_window", None) is None
    return unlimited and config._attn_implementation == PACKED


def _continued_as_tree(
    model: LlavaScaleForConditionalGeneration, cache: Any, captions: Sequence[tuple[int, ...]]
) -> Tensor:
    """The same in one row that holds every beginning of a caption once; each token sees its own beginning alone.

    The keys and values of the prompt are read where they lie, not repeated for each caption.
    """
    beginnings: dict[tuple[int, ...], int] = {}
    for caption in captions:
        for end in range(1, len(caption)):
            beginnings.setdefault(caption[:end], len(beginnings))
    start = cache.get_seq_length()
    sees_NS = torch.zeros(len(beginnings), start + len(beginnings), dtype=torch.bool)
    sees_NS[:, :start] = True
    for beginning, place in beginnings.items():
        if len(beginning) > 1:
            sees_NS[place] = sees_NS[beginnings[beginning[:-1]]]
        sees_NS[place, start + place] = True
    device = model.device
    logits_NV = model(
        input_ids=torch.tensor([[beginning[-1] for beginning in beginnings]], device=device),
        position_ids=torch.tensor([[start + len(beginning) - 1 for beginning in beginnings]], device=device),
        attention_mask=sees_NS[None, None].to(device),
        past_key_values=cache,
        use_cache=True,
    ).logits[0]
    normalizer_N = logits_NV.float().logsumexp(-1)
    totals = torch.zeros(len(captions), device=device)
    for place, caption in enumerate(captions):
        rows = [beginnings[caption[:end]] for end in range(1, len(caption))]
        totals[place] = (logits_NV[rows, list(caption[1:])].float() - normalizer_N[rows]).sum()
    return totals


def split_caption(row: PackedRow) -> tuple[list[int], tuple[int, ...]]:
    """Token ids of the prompt of a row of one sample, and of its first answer."""
    supervised = (row.labels != IGNORE_INDEX).tolist()
    start = supervised.index(True)
    end = next((place for place in range(start, len(supervised)) if not supervised[place]), len(supervised))
    ids = row.input_ids.tolist()
    return ids[:start], tuple(ids[start:end])


def _candidates(
    distinct: Sequence[tuple[int, ...]], own: tuple[int, ...], number: int, rng: random.Random
) -> list[tuple[int, ...]]:
    """``own`` and others, in the order of their lengths."""
    if number >= len(distinct):
        return list(distinct)
    others = [caption for caption in distinct if caption != own]
    chosen = [own, *rng.sample(others, number - 1)]
    return sorted(chosen, key=lambda caption: (len(caption), caption))


def _groups(captions: Sequence[tuple[int, ...]], vocabulary: int) -> list[list[tuple[int, ...]]]:
    """Captions (in the order of their lengths) in groups whose logits fit in memory."""
    groups: list[list[tuple[int, ...]]] = [[]]
    for caption in captions:
        if groups[-1] and (len(groups[-1]) + 1) * len(caption) * vocabulary > _MOST_SCORES:
            groups.append([])
        groups[-1].append(caption)
    return groups
