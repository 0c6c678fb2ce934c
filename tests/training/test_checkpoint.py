from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from llava_scale.config import TrainConfig
from llava_scale.errors import CheckpointError
from llava_scale.training import checkpoint as checkpoints
from llava_scale.training.checkpoint import (
    TrainerState,
    find_checkpoint,
    frozen_fingerprint,
    list_checkpoints,
    load_state,
    save_checkpoint,
    set_aside,
    verify_checkpoint,
)
from llava_scale.training.optim import build_optimizer
from llava_scale.training.recipe import apply_recipe, plan_recipe
from llava_scale.training.tensor_files import restore

STATE = TrainerState(
    step=7,
    total_steps=9,
    loader={"positions": [3, 4]},
    counters={"seconds": 0.1},
    random=[{"torch": "AA=="}],
    frozen="f",
    config={"train": {"learning_rate": 1e-05, "adam_betas": [0.9, 0.95]}},
)


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.ModuleDict(
        {"vision_tower": nn.BatchNorm1d(3), "projector": nn.Linear(3, 4), "language_model": nn.Linear(4, 4)}
    )
    recipe = plan_recipe(model, TrainConfig(stage="align", trainable={"vision_tower": 1e-3}))
    apply_recipe(model, recipe)
    return model, build_optimizer(model, recipe, TrainConfig())


def work(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.arange(12.0).reshape(4, 3)
    model["language_model"](model["projector"](model["vision_tower"](x))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder, step: int = 7, keep: int = 2):
    model, optimizer = build()
    work(model, optimizer)
    path = save_checkpoint(folder, model=model, optimizer=optimizer, state=replace(STATE, step=step), keep=keep)
    return path, model, optimizer


def names(paths):
    return [path.name for path in paths]


def test_a_checkpoint_gives_back_parameters_buffers_moments_and_state(tmp_path):
    path, model, optimizer = save(tmp_path)
    assert path.name == "step-00000007"
    assert load_state(path) == STATE
    other, other_optimizer = build()
    restore(path, model=other, optimizer=other_optimizer)
    for _ in range(2):
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )
        work(model, optimizer)
        work(other, other_optimizer)
    assert not torch.equal(other["vision_tower"].running_mean, torch.zeros(3))


def test_frozen_parameters_are_not_stored(tmp_path):
    path, *_ = save(tmp_path)
    assert "language_model" not in (path / "trainable.safetensors").read_bytes().decode("latin-1")


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    path, *_ = save(tmp_path)
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".json", ".safetensors", ".safetensors", ".yaml"]


def test_a_whole_checkpoint_verifies(tmp_path):
    path, *_ = save(tmp_path)
    assert verify_checkpoint(path) is None
    assert find_checkpoint(tmp_path).found == path


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json", "config.yaml"])
@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink()])
def test_a_damaged_newer_checkpoint_is_passed_over_with_the_reason(tmp_path, name, damage):
    good, *_ = save(tmp_path, 5)
    bad, *_ = save(tmp_path, 6)
    damage(bad / name)
    search = find_checkpoint(tmp_path)
    assert search.found == good
    ((rejected, reason),) = search.rejected
    assert rejected == bad
    assert name in reason


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99, "step": 6, "files": {}}'])
def test_a_damaged_manifest_is_noticed(tmp_path, text):
    path, *_ = save(tmp_path)
    (path / "manifest.json").write_text(text)
    assert verify_checkpoint(path)


def test_no_whole_checkpoint_at_all_is_an_error_that_lists_why(tmp_path):
    path, *_ = save(tmp_path)
    cut(path / "state.json")
    with pytest.raises(CheckpointError, match=r"step-00000007: state\.json has \d+ bytes instead of \d+"):
        find_checkpoint(tmp_path)


def test_nothing_saved_yet_is_no_error(tmp_path):
    assert find_checkpoint(tmp_path / "nothing").found is None


def test_a_checkpoint_that_was_set_aside_is_not_found_again(tmp_path):
    path, *_ = save(tmp_path)
    assert set_aside(path).name == "step-00000007.damaged"
    assert list_checkpoints(tmp_path) == []


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        save(tmp_path, step)
    assert names(list_checkpoints(tmp_path)) == ["step-00000010", "step-00000009"]


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    kept = [save(tmp_path, step)[0] for step in (1, 2)]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_describe", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, 3, keep=1)
    monkeypatch.undo()
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert find_checkpoint(tmp_path).found == kept[1]


def test_a_checkpoint_of_another_model_is_refused_with_the_names(tmp_path):
    path, *_ = save(tmp_path)
    model, optimizer = build()
    model["projector"] = nn.Linear(3, 5)
    with pytest.raises(CheckpointError, match=r"projector\.bias is .*\(4,\), the model's is .*\(5,\)"):
        restore(path, model=model, optimizer=optimizer)
    model["more"] = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"2 names missing \['more\.bias', 'more\.weight'\]"):
        restore(path, model=model, optimizer=optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fingerprint_sees_one_bit_of_a_frozen_parameter_and_no_trained_one(dtype):
    model, _ = build()
    model.to(dtype)
    before = frozen_fingerprint(model)
    with torch.no_grad():
        model["projector"].weight.add_(1)
    assert frozen_fingerprint(model) == before
    with torch.no_grad():
        weight = model["language_model"].weight
        weight[0, 1] = torch.nextafter(weight[0, 1], torch.tensor(9.0, dtype=dtype))
    assert frozen_fingerprint(model) != before


def test_the_fingerprint_sees_the_order_of_values():
    model, _ = build()
    before = frozen_fingerprint(model)
    with torch.no_grad():
        model["language_model"].weight.copy_(model["language_model"].weight.flip(0).clone())
    assert frozen_fingerprint(model) != before


def test_the_state_names_the_versions_that_wrote_it(tmp_path):
    path, *_ = save(tmp_path)
    assert json.loads((path / "state.json").read_text())["versions"]["torch"] == torch.__version__
