from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from llava_scale.errors import ConfigError
from llava_scale.model.head import LogitHead, check_head
from tests.model.parts import TEXT


def test_final_soft_capping_is_honoured():
    config = Gemma2Config(**TEXT, head_dim=6, vocab_size=40, final_logit_softcapping=0.05)
    model = AutoModelForCausalLM.from_config(config).eval()
    check_head(model)
    hidden = torch.randn(5, 24)
    logits = LogitHead(config)(hidden, model.get_output_embeddings())
    assert logits.abs().max() <= 0.05
    plain = LlamaConfig(**TEXT, vocab_size=40)
    assert torch.equal(LogitHead(plain)(hidden, model.lm_head), model.lm_head(hidden))


def test_logits_made_in_an_unknown_way_are_refused(monkeypatch):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT, vocab_size=40)).eval()
    check_head(model)
    plain = model.forward

    def doubled(**kwargs):
        output = plain(**kwargs)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(model, "forward", doubled)
    with pytest.raises(ConfigError, match="LlamaForCausalLM turns hidden states into logits"):
        check_head(model)
