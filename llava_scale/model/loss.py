"""Next-token loss at supervised positions only, in chunks, so that ``[tokens, vocabulary]`` is never held.

Legend: ``B`` rows, ``S`` tokens in a row, ``N`` supervised positions, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_scale.types import IGNORE_INDEX

LogitHead = Callable[[Tensor], Tensor]
"""``(N, D)`` hidden states to ``(N, V)`` logits."""

LOSS_CHUNK = 2048
"""Supervised positions whose logits are held at once, where the caller names no number."""


def next_token_targets(labels_BS: Tensor, cu_seq_lens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Positions that predict a supervised token, and the tokens they predict.

    Args:
        labels_BS: ``(B, S)``, aligned with the input (not shifted), ``IGNORE_INDEX`` where unsupervised.
        cu_seq_lens: ``(K + 1,)`` offsets of the samples packed in the only row. The first token of a sample is
            never the target of the sample before it.

    Returns:
        Positions in the flattened ``(B * S)`` row and their targets, both ``(N,)`` int64, where ``labels_BS`` lie.
    """
    shifted = F.pad(labels_BS[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cu_seq_lens is not None:
        last_of_sample = cu_seq_lens[1:].to(labels_BS.device).long() - 1
        shifted[:, last_of_sample] = IGNORE_INDEX
    flat = shifted.reshape(-1)
    positions = (flat != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, flat[positions]


def summed_cross_entropy(hidden_ND: Tensor, targets_N: Tensor, head: LogitHead, *, chunk: int) -> Tensor:
    """Sum of the cross-entropies (scalar, nats, fp32) of ``head(hidden)`` against ``targets``.

    Up to ``chunk`` positions their logits are held until the backward pass. Above, each chunk's logits are made,
    used and dropped, and made again in the backward pass: at most ``chunk x V`` logits exist at any time.
    """
    if hidden_ND.shape[0] <= chunk:
        return _cross_entropy(hidden_ND, targets_N, head)
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(torch.split(hidden_ND, chunk), torch.split(targets_N, chunk), strict=True):
        total = total + checkpoint(_cross_entropy, part, wanted, head, use_reentrant=False, preserve_rng_state=False)
    return total


def _cross_entropy(hidden_ND: Tensor, targets_N: Tensor, head: LogitHead) -> Tensor:
    return F.cross_entropy(head(hidden_ND).float(), targets_N, reduction="sum")
