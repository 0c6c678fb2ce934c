from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from llava_scale.config import TrainConfig
from llava_scale.training.summary import TrainResult, estimate_memory


def result(**changes: object) -> TrainResult:
    values = {"steps": 3, "total_steps": 3, "loss": 1.0, "seconds": 1.0, "samples": 1, "text_tokens": 1}
    values |= {"visual_tokens": 1, "skipped": 0, "bad_steps": 0, "checkpoint": None, "stopped_by": None}
    return TrainResult(**{"output_dir": Path("run"), "final_dir": Path("run/final"), **values, **changes})  # type: ignore[arg-type]


def test_a_finished_run_exits_with_0_and_leads_to_a_chat():
    assert result().exit_code == 0
    assert result().next_command == "llava-scale chat run/final --image PICTURE 'QUESTION'"


def test_a_stopped_run_exits_as_shells_expect_and_leads_back_to_itself():
    stopped = result(stopped_by=15, final_dir=None)
    assert stopped.exit_code == 143
    assert stopped.next_command == "llava-scale train run/config.yaml --resume"


def test_memory_counts_all_weights_and_three_times_the_trained_ones():
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    model[0].requires_grad_(False)
    memory = estimate_memory(model, TrainConfig(), precision="fp32", row_tokens=0)
    megabyte = 256 * 256 * 4 / 2**30
    assert (memory.weights, memory.training) == pytest.approx((2 * megabyte, 3 * megabyte))
    assert memory.activations == 0
    assert memory.total == pytest.approx(5 * megabyte)
