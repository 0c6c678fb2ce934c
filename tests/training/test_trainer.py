from __future__ import annotations

import functools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llava_scale.errors import CheckpointError, ConfigError, SampleError, TrainingError
from llava_scale.model import build_model, load_model, row_inputs
from llava_scale.training import checkpoint, setup, trainer
from llava_scale.training.trainer import dry_run, train

REPRODUCED = ("step", "loss", "lr", "grad_norm", "samples", "text_tokens", "visual_tokens", "padding", "skipped")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def log_of(config, keys=REPRODUCED):
    lines = [json.loads(text) for text in (Path(config.train.output_dir) / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in keys if key in line} for line in lines if "lr" in line]


def events_of(config, key):
    lines = [json.loads(text) for text in (Path(config.train.output_dir) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def weights_of(result):
    model, _ = load_model(result.final_dir)
    return model.state_dict()


def assert_equal_weights(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def stop_at(step, number=signal.SIGTERM):
    """A callback for ``on_log`` that sends this process a signal."""

    def on_log(line):
        if line["step"] == step and "lr" in line:
            os.kill(os.getpid(), number)

    return on_log


def with_model(monkeypatch, change):
    """Let ``change`` loose on the model of every run that is built from here on."""

    def build(*arguments):
        parts = setup.build_parts(*arguments)
        change(parts.model)
        return parts

    monkeypatch.setattr(trainer, "prepare_run", functools.partial(setup.prepare_run, build=build))


def add_dropout(model):
    model.projector.register_forward_hook(lambda module, _, out: F.dropout(out, 0.2, training=module.training))


def test_a_run_learns_and_leaves_log_config_checkpoints_and_model(make_config):
    config = make_config(steps=8, log_every=4, save_every=4, data={"holdout": 0.2})
    seen = []
    result = train(config, on_log=seen.append)
    folder = Path(config.train.output_dir)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "final",
        "health",
        "log.jsonl",
    ]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]
    first, last = log_of(config)
    assert (first["step"], last["step"]) == (4, 8)
    assert last["loss"] < first["loss"] - 0.5
    assert events_of(config, "eval/loss")[-1]["step"] == 8
    assert seen == [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    assert (result.steps, result.total_steps, result.stopped_by, result.exit_code) == (8, 8, None, 0)
    assert result.loss == last["loss"]
    assert result.evaluation["eval/loss"] > 0


def test_the_loss_of_a_step_is_the_mean_over_its_supervised_tokens_however_they_are_packed(make_config):
    config = make_config(steps=1, rows_per_step=3, stage="align")
    _, batch = dry_run(config)
    model, _ = build_model(config.model, chat_template=config.data.chat_template, seed=config.seed)
    with torch.no_grad():
        losses = [float(model.train()(**row_inputs(row), num_items_in_batch=1).loss) for row in batch.rows]
    count = sum(row.num_supervised for row in batch.rows)
    assert len({row.num_supervised for row in batch.rows}) > 1
    assert train(config).loss == pytest.approx(sum(losses) / count, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(make_config, monkeypatch, precision):
    with_model(monkeypatch, add_dropout)
    whole = make_config(output_dir=str(Path(make_config().train.output_dir).parent / "whole"), precision=precision)
    expected = train(whole)
    config = make_config(precision=precision, save_every=0, log_every=1)
    stopped = train(config, on_log=stop_at(3))
    assert (stopped.steps, stopped.stopped_by, stopped.exit_code) == (3, signal.SIGTERM, 143)
    assert stopped.final_dir is None
    assert stopped.next_command == f"llava-scale train {config.train.output_dir}/config.yaml --resume"
    resumed = train(config, resume=True)
    assert log_of(config) == log_of(whole)
    assert (resumed.loss, resumed.samples) == (expected.loss, expected.samples)
    assert_equal_weights(weights_of(resumed), weights_of(expected))


def test_a_stop_between_two_lines_of_the_log_does_not_show_in_them(make_config, tmp_path):
    whole = make_config(output_dir=str(tmp_path / "whole"), log_every=3, save_every=0)
    train(whole)
    config = make_config(log_every=3, save_every=0)
    train(config, evaluate=lambda *_: {}, trackers=[StopAfter(4)])
    train(config, resume=True)
    assert log_of(config) == log_of(whole)


class StopAfter(trainer.Tracker):
    """Interrupts after a step, as a person at the keyboard would."""

    def __init__(self, step):
        self.last = step

    def step(self, step):
        if step == self.last:
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_of_signals_are_put_back(make_config):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert train(make_config(), trackers=[StopAfter(1)]).exit_code == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(make_config, tmp_path, caplog):
    whole = make_config(output_dir=str(tmp_path / "whole"))
    train(whole)
    config = make_config()
    train(config, on_log=stop_at(5))
    newest = Path(config.train.output_dir) / "checkpoints" / "step-00000005" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    train(config, resume=True)
    assert "step-00000005 is damaged (optimizer.safetensors has" in caplog.text
    assert log_of(config) == log_of(whole)


def test_resume_without_any_checkpoint_starts_at_the_beginning(make_config, tmp_path):
    whole = make_config(output_dir=str(tmp_path / "whole"), steps=2)
    train(whole)
    config = make_config(steps=2)
    folder = Path(config.train.output_dir)
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 9.0, "lr": 1}\n')
    train(config, resume=True)
    assert log_of(config) == log_of(whole)


def test_a_run_killed_before_its_model_was_written_only_writes_it(make_config, monkeypatch):
    config = make_config(steps=2, data={"holdout": 0.2})
    monkeypatch.setattr(trainer.Trainer, "_write_final", lambda self: os.kill(os.getpid(), 0) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config)
    monkeypatch.undo()
    before = (Path(config.train.output_dir) / "log.jsonl").read_text()
    result = train(config, resume=True)
    assert result.final_dir.is_dir()
    assert result.loss == log_of(config)[-1]["loss"]
    assert (Path(config.train.output_dir) / "log.jsonl").read_text() == before


def test_evaluation_and_its_callback_leave_training_as_it_was(make_config, monkeypatch, tmp_path):
    with_model(monkeypatch, add_dropout)
    silent = make_config(output_dir=str(tmp_path / "silent"), steps=3, data={"holdout": 0.2}, eval_every=0)
    train(silent)
    config = make_config(steps=3, data={"holdout": 0.2}, eval_every=1)

    def evaluate(model, processor, step):
        assert not model.training
        return {"draw": float(torch.rand(())), "eval/step": step}

    train(config, evaluate=evaluate)
    assert log_of(config) == log_of(silent)
    evaluations = events_of(config, "eval/loss")
    assert [line["eval/step"] for line in evaluations] == [1, 2, 3]
    assert all(line["eval/samples"] > 0 and "eval/draw" in line for line in evaluations)


def test_an_evaluation_that_a_stop_cut_short_comes_first_after_resuming(make_config):
    config = make_config(steps=4, data={"holdout": 0.2}, eval_every=2, save_every=0)
    train(config, trackers=[StopAfter(2)])
    assert events_of(config, "eval/loss") == []
    train(config, resume=True)
    assert [line["step"] for line in events_of(config, "eval/loss")] == [2, 4]


def test_held_out_samples_are_not_trained_on(make_config):
    config = make_config(steps=1, data={"holdout": 0.3})
    summary, _ = dry_run(config)
    held_out = train(config).evaluation["eval/samples"]
    assert held_out > 0
    assert summary.num_samples + held_out == 48


def test_align_changes_the_projector_and_nothing_else(make_config):
    config = make_config(stage="align", steps=2)
    before, _ = build_model(config.model, chat_template=config.data.chat_template, seed=config.seed)
    after = weights_of(train(config))
    changed = {
        name.partition(".")[0] for name, value in before.state_dict().items() if not torch.equal(value, after[name])
    }
    assert changed == {"projector"}


def test_the_next_stage_takes_over_the_model(make_config, tmp_path):
    first = train(make_config(stage="align", steps=2))
    model = {"preset": "", "init_from": str(first.final_dir)}
    config = make_config(output_dir=str(tmp_path / "second"), model=model, steps=1, learning_rate=1e-9)
    after = weights_of(train(config))
    before = weights_of(first)
    assert max(float((after[name] - before[name]).abs().max()) for name in before) < 1e-6


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_recomputing_activations_changes_no_loss(make_config, monkeypatch, tmp_path, stage):
    losses, calls = {}, []
    for recompute in (False, True):
        config = make_config(
            output_dir=str(tmp_path / str(recompute)), stage=stage, steps=2, gradient_checkpointing=recompute
        )

        def count(model):
            layer = model.language_model.base_model.layers[0].mlp
            layer.register_forward_pre_hook(lambda *_: calls.append(1))

        with_model(monkeypatch, count)
        calls.clear()
        train(config)
        losses[recompute] = log_of(config), len(calls)
    assert losses[True][0] == losses[False][0]
    assert losses[True][1] == 2 * losses[False][1]


def poison(steps):
    """Make the loss of some steps (counted by forward passes in training) not finite."""

    def change(model):
        state = {"passes": 0}

        def hook(module, inputs, output):
            if module.training and torch.is_grad_enabled():
                state["passes"] += 1
                if state["passes"] in steps:
                    output.loss = output.loss * math.nan
            return output

        model.register_forward_hook(hook)

    return change


def test_a_step_that_is_not_finite_is_left_out_counted_and_its_samples_named(make_config, monkeypatch):
    config = make_config(rows_per_step=1, steps=4)
    with_model(monkeypatch, poison({2}))
    result = train(config)
    assert result.bad_steps == 1
    (event,) = events_of(config, "event")
    assert (event["step"], event["event"]) == (2, "non_finite")
    assert event["keys"]
    losses = [line["loss"] for line in log_of(config)]
    assert losses[1] is None
    assert all(loss is not None for loss in (losses[0], *losses[2:]))


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(make_config, monkeypatch):
    config = make_config(rows_per_step=1, steps=6, max_bad_steps=2)
    with_model(monkeypatch, poison({2, 3, 4}))
    with pytest.raises(TrainingError, match=r"not finite in 2 steps in a row \(up to step 3\)"):
        train(config)


def test_unusable_samples_are_counted_and_listed_once_also_after_a_resume(make_config, make_shards, tmp_path):
    path = make_shards(num_samples=40, broken=(0, 1, 11, 20, 31))
    limits = {"max_bad_fraction": 0.5, "packing": {"row_length": 96}}
    whole = make_config(data_path=path, data=limits, output_dir=str(tmp_path / "whole"), steps=0, epochs=1)
    expected = train(whole)
    assert expected.skipped >= 4
    config = make_config(data_path=path, data=limits, steps=0, epochs=1, save_every=2)
    train(config, on_log=stop_at(3))
    shutil_rmtree(Path(config.train.output_dir) / "checkpoints" / "step-00000003")
    train(config, resume=True)
    assert log_of(config) == log_of(whole)

    def listed(settings):
        return (Path(settings.train.output_dir) / "skipped.jsonl").read_text()

    assert listed(config) == listed(whole)
    assert len(listed(whole).splitlines()) == expected.skipped


def shutil_rmtree(path):
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def test_too_many_unusable_samples_end_the_run_with_the_last_one_named(make_config, make_shards):
    path = make_shards(num_samples=20, broken=range(20))
    config = make_config(data_path=path, data={"max_bad_in_a_row": 3}, steps=50)
    with pytest.raises(SampleError, match=r"shard-0000\d\.tar.*max_bad_in_a_row=3"):
        train(config)


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(make_config, monkeypatch):
    config = make_config()
    real, calls = checkpoint._describe, []

    def full(path):
        calls.append(path)
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(checkpoint, "_describe", full)
    with pytest.raises(CheckpointError, match=r"step-00000004: .*No space left"):
        train(config)
    monkeypatch.undo()
    folder = Path(config.train.output_dir) / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    assert train(config, resume=True).steps == 6


def test_a_second_run_in_a_folder_is_refused(make_config):
    config = make_config(steps=1)
    train(config)
    with pytest.raises(ConfigError, match="--resume"):
        train(config)


def test_a_resumed_run_may_not_compute_something_else(make_config):
    train(make_config(steps=1))
    with pytest.raises(ConfigError, match=r"train\.learning_rate: 0\.001 -> 0\.5"):
        train(make_config(steps=1, learning_rate=0.5), resume=True)


def test_frozen_parameters_that_changed_since_are_noticed(make_config, monkeypatch):
    config = make_config(steps=2, stage="align")
    train(config, trackers=[StopAfter(1)])

    def change(model):
        next(model.vision_tower.parameters()).data.add_(1e-3)

    with_model(monkeypatch, change)
    with pytest.raises(CheckpointError, match="frozen parameters are not those"):
        train(config, resume=True)


def test_a_dry_run_builds_the_first_batch_and_writes_nothing(make_config):
    config = make_config()
    summary, batch = dry_run(config)
    assert (batch.step, len(batch.rows)) == (0, 2)
    assert (summary.total_steps, summary.num_samples) == (6, 48)
    assert not Path(config.train.output_dir).exists()


def test_epochs_become_steps_that_use_every_sample(make_config):
    config = make_config(steps=0, epochs=1, log_every=100, save_every=0, data={"packing": {"row_length": 256}})
    result = train(config)
    assert result.samples >= 48
    assert result.total_steps == result.steps > 1


def test_no_data_is_named(make_config):
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        train(make_config(data={"sources": []}))


def test_a_device_that_is_not_there_is_named(make_config):
    with pytest.raises(ConfigError, match=r"train\.device: 'tpu' is unknown"):
        train(make_config(device="tpu"))


def test_neither_steps_nor_epochs_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"train\.steps and train\.epochs are both 0"):
        train(make_config(steps=0, epochs=0))


def test_float16_weights_are_not_trained(make_config):
    with pytest.raises(ConfigError, match="train in float32 or bfloat16"):
        train(make_config(model={"torch_dtype": "float16"}))


def test_the_precision_is_chosen_for_the_device_where_it_is_left_open(make_config, monkeypatch):
    chosen = {}
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_bf16": amx}, raising=False)
        chosen[amx] = dry_run(make_config(precision="auto"))[0].precision
    assert chosen == {False: "fp32", True: "bf16"}
    assert dry_run(make_config(precision="bf16"))[0].precision == "bf16"
