from __future__ import annotations

import pytest
import torch

from llava_scale.compressors import PROJECTORS, build_projector
from llava_scale.errors import ConfigError


@pytest.mark.parametrize("name", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
def test_projectors_keep_the_tokens_and_change_the_width(name):
    assert build_projector(name, 6, 10, input_norm=False)(torch.randn(2, 5, 6)).shape == (2, 5, 10)


def test_parameters_are_numbered_as_in_llava():
    names = set(build_projector("mlp2x_gelu", 6, 10, input_norm=False).state_dict())
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}
    with_norm = set(build_projector("mlp2x_gelu", 6, 10, input_norm=True).state_dict())
    assert with_norm == names | {"norm.weight", "norm.bias"}


def test_the_deep_projector_computes_what_its_name_says():
    projector = build_projector("mlp2x_gelu", 6, 10, input_norm=False)
    first, activation, second = projector.layers
    x = torch.randn(1, 3, 6)
    assert isinstance(activation, torch.nn.GELU)
    assert torch.equal(projector(x), second(activation(first(x))))


def test_an_input_norm_makes_the_scale_of_the_features_irrelevant():
    projector = build_projector("linear", 6, 10, input_norm=True)
    x = torch.randn(1, 3, 6)
    assert torch.allclose(projector(x), projector(100 * x), atol=1e-4)


def test_identity_changes_nothing_and_needs_equal_widths():
    projector = build_projector("identity", 6, 6, input_norm=False)
    x = torch.randn(1, 3, 6)
    assert torch.equal(projector(x), x)
    assert not list(projector.parameters())
    with pytest.raises(ConfigError, match="tower has 6 and the language model 8"):
        build_projector("identity", 6, 8, input_norm=False)


def test_scaling_the_output_scales_every_output():
    projector = build_projector("mlp2x_gelu", 6, 10, input_norm=False)
    x = torch.randn(1, 3, 6)
    before = projector(x)
    projector.scale_output(0.25)
    assert torch.allclose(projector(x), 0.25 * before, atol=1e-6)
    with pytest.raises(ConfigError, match="match_embedding_scale"):
        build_projector("identity", 6, 6, input_norm=False).scale_output(2.0)


def test_an_unknown_projector_is_an_error_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'mlp2x_gelu'"):
        build_projector("mlp2x_gleu", 6, 10, input_norm=False)
    assert "linear" in PROJECTORS
