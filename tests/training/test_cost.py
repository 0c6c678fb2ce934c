from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_scale.config import TrainConfig
from llava_scale.config.load import parse_config
from llava_scale.model import build_model, row_inputs
from llava_scale.training.cost import Work, known_peak, model_cost, peak_tflops
from llava_scale.training.recipe import apply_recipe, plan_recipe
from llava_scale.types import PackedRow


@pytest.mark.parametrize(
    "train",
    [{"stage": "instruct"}, {"stage": "align"}, {"trainable": {r"vision_tower\.": 1e-5}}],
    ids=["instruct", "align", "all"],
)
def test_counted_operations_are_those_that_torch_counts(train):
    config = parse_config({"model": {"preset": "tiny"}}, origin="test")
    model, processor = build_model(config.model, chat_template="native", seed=0)
    apply_recipe(model, plan_recipe(model, TrainConfig(**train)))
    text, visual = 120, model.vision_tower.num_tokens
    ids = torch.cat([torch.full((visual,), model.config.image_token_id), torch.arange(text) % 200])
    labels = ids.clone()
    labels[:visual] = -100
    row = PackedRow(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(len(ids)),
        cu_seq_lens=torch.tensor([0, len(ids)], dtype=torch.int32),
        pixel_values=torch.zeros(1, 3, *[processor.image_transform.size] * 2, dtype=torch.uint8),
        image_num_tokens=(visual,),
    )
    counter = FlopCounterMode(display=False)
    with counter:
        model(**row_inputs(row)).loss.backward()
    work = Work(tokens=len(ids), squares=len(ids) ** 2, supervised=text, visual=visual, pictures=1)
    # Torch counts all pairs of causal attention, and 5 products where 4 are needed backward.
    assert model_cost(model).flops(work) == pytest.approx(counter.get_total_flops(), rel=0.12)


def test_the_longest_known_name_wins():
    assert known_peak("NVIDIA H100 80GB HBM3") == 989
    assert known_peak("NVIDIA L40S") == 362
    assert known_peak("NVIDIA GB200") == 2500
    assert known_peak("abacus") == 0
    assert peak_tflops(torch.device("cpu"), 1.5) == 1.5
    assert peak_tflops(torch.device("cpu")) == 0
