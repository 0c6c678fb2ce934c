from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_scale.errors import CheckpointError
from llava_scale.model import load_model
from llava_scale.training.export import export_checkpoint
from llava_scale.training.trainer import train


def test_a_checkpoint_becomes_the_model_that_the_run_had_then(make_config, tmp_path):
    config = make_config(steps=2, save_every=1)
    result = train(config)
    run = Path(config.train.output_dir)
    assert export_checkpoint(run, tmp_path / "last") == 2
    assert export_checkpoint(run, tmp_path / "first", step=1) == 1
    folders = (result.final_dir, tmp_path / "last", tmp_path / "first")
    final, last, first = (load_model(path)[0].state_dict() for path in folders)
    assert all(torch.equal(final[name], last[name]) for name in final)
    assert not all(torch.equal(final[name], first[name]) for name in final)


def test_what_cannot_be_exported_is_named(make_config, tmp_path):
    config = make_config(steps=1)
    train(config)
    run = Path(config.train.output_dir)
    with pytest.raises(CheckpointError, match="no checkpoint of step 9; there are: 1"):
        export_checkpoint(run, tmp_path / "out", step=9)
    with pytest.raises(CheckpointError, match="exists already"):
        export_checkpoint(run, tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "out")
    (run / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        export_checkpoint(run, tmp_path / "out", step=1)
