from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    EfficientNetConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from llava_scale.errors import ConfigError, ShapeError
from llava_scale.towers import VISION_TOWERS, CustomVisionTower, TransformersVisionTower

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
FAMILIES = {
    "clip": (CLIPVisionConfig(**SMALL), 1),
    "siglip": (SiglipVisionConfig(**SMALL), 0),
    "dinov2": (Dinov2Config(**SMALL, mlp_ratio=2), 1),
    "dinov2_with_registers": (Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, num_register_tokens=3), 4),
    "vit": (ViTConfig(**SMALL), 1),
}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def tower_of(config, model=None, *, layer=-2, select="patch", size=16):
    return TransformersVisionTower(
        config,
        feature_layer=layer,
        image_size=size,
        image_mean=MEAN,
        image_std=STD,
        feature_select=select,
        model=model,
    ).eval()


@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cut_tower_gives_the_hidden_state_of_the_whole_model(family, layer):
    config, num_prefix = FAMILIES[family]
    model = AutoModel.from_config(config).eval()
    pixels = torch.randn(2, 3, 16, 16)
    expected = model(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
    num_parameters = sum(p.numel() for p in model.parameters())
    full, patch = tower_of(config, model, layer=layer, select="full"), tower_of(config, model, layer=-1)
    torch.testing.assert_close(full(pixels), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patch(pixels), expected[:, num_prefix:], atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in full.parameters()) < num_parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_the_promised_shapes_are_the_real_ones(family):
    config, num_prefix = FAMILIES[family]
    for select, extra in (("patch", 0), ("full", num_prefix)):
        tower = tower_of(config, select=select)
        assert tower.grid(16, 16) == (4, 4)
        assert tower.grid(32, 16) == (8, 4)
        assert (tower.num_prefix_tokens, tower.num_tokens, tower.hidden_size) == (num_prefix, 16 + extra, 16)
        assert tower(torch.zeros(1, 3, 16, 16)).shape == (1, tower.num_tokens, tower.hidden_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_cut_tower_gets_a_gradient(family):
    tower = tower_of(FAMILIES[family][0], select="full")
    tower(torch.randn(1, 3, 16, 16)).sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_interpolated_to_another_picture_size(family):
    config, _ = FAMILIES[family]
    tower = tower_of(config, size=24)
    assert tower.num_tokens == 36
    assert tower(torch.zeros(1, 3, 24, 24)).shape == (1, 36, 16)


@pytest.mark.parametrize(("layer", "rows", "width"), [(-1, 2, 16), (-2, 4, 8)])
@torch.no_grad()
def test_a_convolutional_tower_is_cut_between_stages(layer, rows, width):
    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], image_size=64)
    model = AutoModel.from_config(config).eval()
    pixels = torch.randn(1, 3, 64, 64)
    feature_map = model(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
    tower = tower_of(config, model, layer=layer, size=64)
    assert (tower.grid(64, 64), tower.num_tokens, tower.hidden_size) == ((rows, rows), rows * rows, width)
    torch.testing.assert_close(tower(pixels)[0, 1], feature_map[0, :, 0, 1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="pictures of 64 pixels only"):
        tower.grid(32, 32)


def test_a_tower_without_a_stack_of_blocks_is_used_whole():
    config = EfficientNetConfig(image_size=64, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320)
    tower = tower_of(config, layer=-1, size=64)
    assert tower(torch.randn(1, 3, 64, 64)).shape == (1, tower.num_tokens, tower.hidden_size) == (1, 4, 320)
    with pytest.raises(ConfigError, match="vision_feature_layer=-1"):
        tower_of(config, layer=-2, size=64)


def test_uint8_pictures_are_scaled_and_normalised_and_floats_are_not():
    tower = tower_of(FAMILIES["clip"][0])
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    normalised = (pixels.float() / 255 - mean) / std
    assert torch.allclose(tower(pixels), tower(normalised), atol=1e-5)


def test_sixteen_bit_towers_normalise_in_float32():
    tower = tower_of(FAMILIES["clip"][0])
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    exact = tower.normalize(pixels, torch.float32)
    assert torch.equal(tower.bfloat16().normalize(pixels, torch.float32), exact)
    assert tower(pixels).dtype == torch.bfloat16


def test_pictures_of_another_size_are_refused():
    tower = tower_of(FAMILIES["clip"][0])
    with pytest.raises(ShapeError, match=r"must be \(B, 3, 16, 16\)"):
        tower(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_does_not_exist_is_refused(layer):
    with pytest.raises(ConfigError, match="hidden states 0 to 3"):
        tower_of(FAMILIES["clip"][0], layer=layer)


class PatchMeans(nn.Module):
    """Mean colour of each patch, widened: a tower of the user's own."""

    hidden_size = 6
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)

    def __init__(self, patch: int = 4, image_size: int = 16) -> None:
        super().__init__()
        self.patch, self.image_size = patch, image_size
        self.widen = nn.Linear(3, self.hidden_size)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch, width // self.patch

    def forward(self, pixels):
        means = nn.functional.avg_pool2d(pixels, self.patch)
        return self.scale * self.widen(means.flatten(2).transpose(1, 2))


class WrongCount(PatchMeans):
    def forward(self, pixels):
        return super().forward(pixels)[:, 1:]


def custom(name, **kwargs):
    return CustomVisionTower(
        f"{__name__}:{name}", kwargs, image_size=16, image_mean=MEAN, image_std=STD, feature_select="patch"
    )


def test_a_module_by_import_path_is_a_tower():
    tower = custom("PatchMeans", patch=8)
    assert (tower.grid(16, 16), tower.num_tokens, tower.hidden_size) == ((2, 2), 4, 6)
    assert tower(torch.zeros(3, 3, 16, 16, dtype=torch.uint8)).shape == (3, 4, 6)


def test_a_module_that_breaks_its_promise_is_caught():
    with pytest.raises(ShapeError, match=r"returned \(1, 15, 6\)"):
        custom("WrongCount")(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("path", "kwargs", "message"),
    [
        ("no_such_module_here:Tower", {}, "cannot be imported"),
        ("torch.nn:NoSuchClass", {}, "cannot be imported"),
        ("subprocess:Popen", {"args": "true"}, "must be an nn.Module class"),
        ("torch.nn:Linear", {"in_features": 1, "out_features": 1}, "must be an nn.Module class with a method grid"),
        (f"{__name__}:PatchMeans", {"depth": 3}, "refuses vision_tower_kwargs"),
    ],
)
def test_import_paths_that_are_no_tower_are_refused(path, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        CustomVisionTower(path, kwargs, image_size=16, image_mean=MEAN, image_std=STD, feature_select="patch")


def test_towers_are_listed_by_where_they_come_from():
    assert {"transformers": TransformersVisionTower, "custom": CustomVisionTower} == VISION_TOWERS
