from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_scale.config import TrainConfig
from llava_scale.errors import ConfigError
from llava_scale.training.recipe import apply_recipe, plan_recipe, set_training_modes


class Composite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.projector = nn.Linear(4, 5)
        self.language_model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5), nn.LayerNorm(5))


def rates(**settings: object) -> dict[str, float]:
    return plan_recipe(Composite(), TrainConfig(learning_rate=1e-3, **settings)).learning_rates


def modules_of(names: object) -> set[str]:
    return {name.partition(".")[0] for name in names}  # type: ignore[attr-defined]


def test_align_trains_the_projector_only():
    assert rates(stage="align") == {"projector.weight": 1e-3, "projector.bias": 1e-3}


def test_instruct_also_trains_the_language_model():
    assert modules_of(rates(stage="instruct")) == {"projector", "language_model"}


def test_a_later_rule_wins_over_an_earlier_one_and_over_the_stage():
    found = rates(stage="align", trainable={"vision_tower": 1e-4, r".*\.bias": 0.0, r"vision_tower\.0\.bias": 5e-5})
    assert found == {
        "vision_tower.0.weight": 1e-4,
        "vision_tower.1.weight": 1e-4,
        "vision_tower.0.bias": 5e-5,
        "projector.weight": 1e-3,
    }


def test_a_rule_that_matches_nothing_lists_the_top_level_names():
    message = r"'projecter' matches no parameter; names begin with vision_tower\., projector\., language_model\."
    with pytest.raises(ConfigError, match=message):
        rates(trainable={"projecter": 1e-4})


def test_a_rule_that_is_no_regular_expression_is_refused():
    with pytest.raises(ConfigError, match="not a regular expression"):
        rates(trainable={"a(": 1e-4})


def test_a_negative_learning_rate_is_refused():
    with pytest.raises(ConfigError, match="must not be negative"):
        rates(trainable={"projector": -1e-4})


def test_a_recipe_that_trains_nothing_is_refused():
    with pytest.raises(ConfigError, match="every parameter frozen"):
        rates(stage="align", trainable={"projector": 0.0})


def test_the_summary_counts_what_is_trained_in_each_module():
    recipe = plan_recipe(
        Composite(), TrainConfig(stage="align", learning_rate=1e-3, trainable={r"vision_tower\.1": 1e-4})
    )
    lines = {line.name: (line.num_parameters, line.num_trainable, line.learning_rates) for line in recipe.modules}
    assert lines == {
        "vision_tower": (24, 8, (1e-4,)),
        "projector": (25, 25, (1e-3,)),
        "language_model": (40, 0, ()),
    }
    assert (recipe.num_parameters, recipe.num_trainable) == (89, 33)


def test_a_frozen_tower_keeps_its_statistics_and_has_no_dropout():
    model = Composite()
    apply_recipe(model, plan_recipe(model, TrainConfig(stage="align")))
    before = model.vision_tower[1].running_mean.clone()
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.vision_tower(x), model.vision_tower(x))
    assert torch.equal(model.vision_tower[1].running_mean, before)
    assert not model.vision_tower(x).requires_grad
    assert model.projector.training


def test_a_trained_module_is_in_training_mode():
    model = Composite()
    apply_recipe(model, plan_recipe(model, TrainConfig(stage="instruct")))
    assert model.language_model[1].training
    assert not model.vision_tower[2].training


def test_a_frozen_layer_that_recomputes_does_so_while_its_parts_stay_in_evaluation_mode():
    model = Composite()
    apply_recipe(model, plan_recipe(model, TrainConfig(stage="align")))
    model.language_model.gradient_checkpointing = True  # type: ignore[assignment]
    set_training_modes(model)
    assert model.language_model.training
    assert not model.language_model[1].training


class Hearing(Composite):
    def __init__(self) -> None:
        super().__init__()
        self.audio_tower = nn.Linear(2, 3)
        self.audio_projector = nn.Linear(3, 5)


def hearing_rates(**settings: object) -> dict[str, float]:
    return plan_recipe(Hearing(), TrainConfig(learning_rate=1e-3, **settings)).learning_rates


def test_align_audio_trains_the_audio_projector_only():
    assert modules_of(hearing_rates(stage="align_audio")) == {"audio_projector"}
    with pytest.raises(ConfigError, match="nothing is trained"):
        rates(stage="align_audio")


def test_instruct_av_leaves_only_the_vision_tower_alone():
    found = hearing_rates(stage="instruct_av", trainable={r"audio_tower\.": 1e-5})
    assert modules_of(found) == {"audio_tower", "audio_projector", "projector", "language_model"}
    assert found["audio_tower.weight"] == 1e-5
