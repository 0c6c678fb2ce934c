"""Training with compressors: rows follow the ramp, logs show what was removed, a resumed run goes on alike."""

from __future__ import annotations

import json

import pytest

from llava_scale.config.load import parse_config
from llava_scale.training.metrics import Meter
from llava_scale.training.trackers import _training_text
from llava_scale.training.trainer import dry_run, train

MERGING = {"type": "token_merging", "ratio": 0.5, "warmup_steps": 6}
QFORMER = {"type": "qformer", "num_queries": 4, "num_heads": 4}


def tiny(compressor):
    """Model section: pictures of 3 x 3 features."""
    return {"preset": "tiny", "image_size": 72, "compressor": compressor}


def lines_of(result):
    return [json.loads(text) for text in (result.output_dir / "log.jsonl").read_text().splitlines()]


def trained(make_config, compressor, **settings):
    config = make_config(model=tiny(compressor), **{"log_every": 1, **settings})
    return train(config)


def test_the_log_shows_the_ramp_and_the_rows_hold_what_it_leaves(make_config):
    result = trained(make_config, MERGING, steps=8)
    lines = [line for line in lines_of(result) if "loss" in line]
    removed = [line["removed"] for line in lines]
    assert removed[0] == 0.0
    assert removed == sorted(removed)
    assert removed[-1] == pytest.approx(4 / 9, abs=1e-3)  # 5 of 9 tokens are left
    last = lines[-1]
    assert 0 < last["visual_tokens"] < last["visual_tokens_before"]
    assert last["visual_per_sample"] / last["visual_before_per_sample"] == pytest.approx(5 / 9, abs=1e-2)
    assert last["visual_tokens_before"] % 9 == 0
    assert " to 5 (-44%)" in _training_text(last)
    assert "visual tokens" not in _training_text(lines[0])


def test_later_rows_hold_more_samples(make_config):
    packing = {"packing": {"mode": "tokens", "row_length": 64}}
    config = make_config(
        model=tiny({**MERGING, "ratio": 0.65, "warmup_steps": 4}), data=packing, steps=12,
        log_every=1,
    )  # fmt: skip
    lines = [line for line in lines_of(train(config)) if "loss" in line]
    first, last = lines[1]["samples"] / 2, (lines[-1]["samples"] - lines[-4]["samples"]) / 3
    assert last > first


@pytest.mark.parametrize("compressor", [MERGING, QFORMER], ids=["token_merging", "qformer"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(make_config, tmp_path, compressor):
    model = tiny(compressor)
    whole = train(make_config(model=model, steps=6, log_every=1, output_dir=str(tmp_path / "whole")))
    options = {"model": model, "steps": 6, "log_every": 1, "save_every": 3, "output_dir": str(tmp_path / "parts")}
    halves = train(make_config(**options))
    (halves.output_dir / "checkpoints" / "step-00000006").rename(tmp_path / "aside")
    resumed = train(make_config(**options), resume=True)
    names = ("step", "loss", "visual_tokens", "visual_tokens_before", "removed", "samples")
    found, expected = ([[line[name] for name in names] for line in lines_of(run) if "loss" in line]
                       for run in (resumed, whole))  # fmt: skip
    assert found == expected


def test_stages_train_compressors_and_leave_the_reader_of_questions_alone(make_config):
    config = make_config(model=tiny(QFORMER), stage="align")
    summary, _ = dry_run(config)
    trainable = {module.name: module.num_trainable for module in summary.modules}
    assert trainable["compressor"] > 0
    assert trainable["projector"] > 0
    assert trainable["instruction_tower"] == trainable["vision_tower"] == trainable["language_model"] == 0


def test_a_meter_that_was_saved_without_the_new_counts_is_taken_up():
    import torch

    meter = Meter(device=torch.device("cpu"), row_length=8)
    state = meter.state_dict()
    for name in ("total", "mark"):
        del state[name]["visual_tokens_before"]
    meter.load_state_dict(state)
    assert meter.total.visual_tokens_before == 0


def test_configs_with_compressors_are_saved_and_read_back(make_config):
    from llava_scale.config import to_dict

    config = make_config(model=tiny(QFORMER))
    assert parse_config(to_dict(config), origin="saved") == config
