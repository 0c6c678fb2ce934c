"""The last step of a language model: hidden states to logits, with the factors that some families apply."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llava_scale.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class LogitHead:
    """Applies a language model's output embeddings outside of its forward, so that positions can be chosen.

    Factors are read from the language model's config: ``logits_scaling`` (Granite) divides, ``logit_scale`` (Cohere)
    multiplies, ``final_logit_softcapping`` (Gemma) caps softly. ``check_head`` compares with the model's own logits.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.factor = float(getattr(config, "logit_scale", None) or 1.0)
        self.factor /= float(getattr(config, "logits_scaling", None) or 1.0)
        self.cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)

    def __call__(self, hidden: Tensor, output_embeddings: nn.Module) -> Tensor:
        """Return logits ``(..., V)`` of hidden states ``(..., D)``."""
        logits: Tensor = output_embeddings(hidden)
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.cap:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


@torch.no_grad()
def check_head(language_model: PreTrainedModel) -> None:
    """Refuse a language model whose logits we would not reproduce.

    Raises:
        ConfigError: it computes its logits in a way that ``LogitHead`` does not know.
    """
    embeddings = language_model.get_output_embeddings()
    if embeddings is None:
        raise ConfigError(f"{type(language_model).__name__} has no output embeddings")
    was_training = language_model.training
    language_model.eval()
    input_ids = torch.arange(4, device=language_model.device)[None]
    expected = language_model(input_ids=input_ids, use_cache=False).logits
    hidden = language_model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    logits = LogitHead(language_model.config)(hidden, embeddings)
    language_model.train(was_training)
    tolerance = 1e-5 if logits.dtype == torch.float32 else 2e-2
    if not torch.allclose(logits.float(), expected.float(), rtol=tolerance, atol=tolerance):
        raise ConfigError(
            f"{type(language_model).__name__} turns hidden states into logits in a way that is not supported; "
            "please report its name"
        )
