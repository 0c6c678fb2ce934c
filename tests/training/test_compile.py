from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava_scale.training.trackers import Tracker
from llava_scale.training.trainer import train


class GraphCount(Tracker):
    """Compiled graphs after each step."""

    def __init__(self):
        self.after = []

    def step(self, step):
        from torch._dynamo.utils import counters

        self.after.append(counters["stats"]["unique_graphs"])


def losses(config):
    lines = map(json.loads, (Path(config.train.output_dir) / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "lr" in line]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_compute_the_same_and_are_compiled_once_for_rows_of_any_length(make_config, tmp_path):
    torch._dynamo.reset()
    settings = {"steps": 8, "data": {"packing": {"row_length": 96, "lookahead_rows": 1}}}
    plain = make_config(output_dir=str(tmp_path / "plain"), **settings)
    train(plain)
    config = make_config(compile=True, **settings)
    graphs = GraphCount()
    train(config, trackers=[graphs])
    assert losses(config) == pytest.approx(losses(plain), rel=1e-4)
    assert graphs.after[0] > 0, "nothing was compiled"
    assert graphs.after[-1] == graphs.after[1]
