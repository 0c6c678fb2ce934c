"""The text tower that reads the user's question for compressors that want to know it.

Legend: ``B`` questions, ``L`` tokens of a question, ``E`` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.towers.hub import quiet_loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 512
"""Tokens of a question that are read where neither tokenizer nor encoder name a limit."""

MULTIPLE = 16
"""Questions are padded to a multiple of this, so that there are few different shapes."""

Encoded = tuple[Tensor, Tensor]
"""Token ids and mask of several questions, both ``(B, L)``."""


class InstructionTower(nn.Module):
    """Any text encoder of transformers; its last hidden states are the features.

    Args:
        config: Of the encoder.
        model: The encoder with weights; a fresh one if None.
    """

    def __init__(self, config: PreTrainedConfig, *, model: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.model = AutoModel.from_config(config) if model is None else model
        if isinstance(getattr(self.model, "pooler", None), nn.Module):
            self.model.pooler = None  # a parameter that no gradient would ever reach
        self.hidden_size = int(self.model.config.hidden_size)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Features ``(B, L, E)``.

        Args:
            input_ids: ``(B, L)``.
            mask: ``(B, L)`` bool, false on padding. A question without any token gets features that mean nothing.
        """
        # softmax over nothing is not a number: an empty question looks at its first padding token
        seen = mask.clone()
        seen[:, 0] |= ~mask.any(dim=1)
        features: Tensor = self.model(input_ids=input_ids, attention_mask=seen.long()).last_hidden_state
        return features


def instruction_config_of(name: str) -> PreTrainedConfig:
    """Config of the text encoder in ``name``; of the text part, if a vision model lies beside it.

    Raises:
        ConfigError: nothing of transformers lies there.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.instruction_tower {name!r} cannot be read: {error}") from None
    return getattr(config, "text_config", config)


def load_instruction_model(name: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Load the text encoder of ``name`` with all of its weights.

    Raises:
        CheckpointError: weights of the encoder are missing.
    """
    with quiet_loading():
        model, report = AutoModel.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True)
    missing = [key for key in (*report["missing_keys"], *report["mismatched_keys"]) if "pooler" not in str(key)]
    if missing:
        raise CheckpointError(f"{name} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]!r}")
    return model


def instruction_tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """Tokenizer of the text encoder in ``name``.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of model.instruction_tower {name!r} cannot be loaded: {error}") from None


def longest_question(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """Tokens of a question that the encoder can read: CLIP 77, BERT 512."""
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    # a tokenizer without a limit names an absurd number
    return min([int(limit) for limit in limits if isinstance(limit, int) and 0 < limit < 10**6], default=LONGEST)


def encode_questions(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int) -> Encoded:
    """Token ids ``(B, L)`` and mask of ``texts``, padded on the right; nothing is seen of an empty text.

    A question is read for orientation only, so what lies beyond ``longest`` tokens is left out.
    """
    lists: list[list[int]] = []
    if any(texts):
        options: dict[str, Any] = {"truncation": True, "max_length": longest}
        lists = tokenizer(list(texts), **options)["input_ids"]
    lists = [ids if text else [] for ids, text in zip(lists or [[]] * len(texts), texts, strict=True)]
    widest = max(map(len, lists), default=0)
    width = min(max(-(-widest // MULTIPLE) * MULTIPLE, 1), max(longest, 1))
    input_ids = torch.full((len(lists), width), tokenizer.pad_token_id or 0, dtype=torch.int64)
    mask = torch.zeros(len(lists), width, dtype=torch.bool)
    for number, ids in enumerate(lists):
        input_ids[number, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[number, : len(ids)] = True
    return input_ids, mask
