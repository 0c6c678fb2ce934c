from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from efficientnet_tower import (
    BATCH_NORM_EPS,
    HEAD_CHANNELS,
    STAGES,
    EfficientNetLite0,
    EfficientNetLite0Classifier,
    SamePadConv,
    read_state,
)
from torch.nn import functional as F

from llava_scale.errors import CheckpointError, ConfigError
from llava_scale.towers import import_encoder


def original_state() -> dict[str, torch.Tensor]:
    """Random weights under the original network's names, batch norms included."""
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def add(conv: str, norm: str, shape: tuple[int, ...]) -> None:
        fan_in = shape[1] * shape[2] * shape[3]
        state[f"{conv}.weight"] = torch.randn(shape) / fan_in**0.5
        state[f"{norm}.weight"] = torch.rand(shape[0]) + 0.5
        state[f"{norm}.bias"] = torch.randn(shape[0]) * 0.1
        state[f"{norm}.running_mean"] = torch.randn(shape[0]) * 0.1
        state[f"{norm}.running_var"] = torch.rand(shape[0]) + 0.5

    add("_conv_stem", "_bn0", (32, 3, 3, 3))
    width, number = 32, 0
    for kernel, _, expansion, channels, repeats in STAGES:
        for _ in range(repeats):
            inner, block = width * expansion, f"_blocks.{number}"
            if expansion != 1:
                add(f"{block}._expand_conv", f"{block}._bn0", (inner, width, 1, 1))
            add(f"{block}._depthwise_conv", f"{block}._bn1", (inner, 1, kernel, kernel))
            add(f"{block}._project_conv", f"{block}._bn2", (channels, inner, 1, 1))
            width, number = channels, number + 1
    add("_conv_head", "_bn1", (HEAD_CHANNELS, width, 1, 1))
    state["_fc.weight"] = torch.randn(1000, HEAD_CHANNELS)
    state["_fc.bias"] = torch.randn(1000)
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(original_state(), path)
    return path


def reference(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The network as published: convolution, batch norm, ReLU6, nothing folded."""

    def step(x: torch.Tensor, conv: str, norm: str, *, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = state[f"{conv}.weight"]
        total = max((-(-x.shape[2] // stride) - 1) * stride + weight.shape[2] - x.shape[2], 0)
        before, after = total // 2, total - total // 2
        x = F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)
        mean, variance, gain, bias = (
            state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, gain, bias, eps=BATCH_NORM_EPS)

    x, number = F.relu6(step(pixels, "_conv_stem", "_bn0", stride=2)), 0
    for _, first_stride, expansion, _, repeats in STAGES:
        for repeat in range(repeats):
            block, start = f"_blocks.{number}", x
            if expansion != 1:
                x = F.relu6(step(x, f"{block}._expand_conv", f"{block}._bn0"))
            stride = first_stride if repeat == 0 else 1
            x = F.relu6(step(x, f"{block}._depthwise_conv", f"{block}._bn1", stride=stride, groups=x.shape[1]))
            x = step(x, f"{block}._project_conv", f"{block}._bn2")
            x = x + start if x.shape == start.shape and stride == 1 else x
            number += 1
    return F.relu6(step(x, "_conv_head", "_bn1"))


def test_features_equal_those_of_the_network_with_its_batch_norms(weights: Path) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    tower = EfficientNetLite0(weights=str(weights), image_size=64)
    expected = reference(read_state(weights), pixels)
    features = tower(pixels)
    assert features.shape == (2, 4, 1280)
    assert tower.grid(64, 64) == (2, 2)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(features, expected.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_training_mode_changes_neither_features_nor_weights(weights: Path) -> None:
    tower = EfficientNetLite0(weights=str(weights), image_size=64)
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(tower.train()(pixels), tower.eval()(pixels))
    assert not list(tower.buffers())


def test_pooled_features_are_averages_over_the_grid(weights: Path) -> None:
    pixels = torch.randn(1, 3, 128, 128)
    full = EfficientNetLite0(weights=str(weights), image_size=128)(pixels)
    tower = EfficientNetLite0(weights=str(weights), image_size=128, pool=1)
    assert tower.grid(128, 128) == (1, 1)
    torch.testing.assert_close(tower(pixels)[:, 0], full.mean(dim=1))


def test_the_classifier_averages_the_grid_and_applies_the_head(weights: Path) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    state = read_state(weights)
    pooled = reference(state, pixels).mean(dim=(2, 3))
    expected = pooled @ state["_fc.weight"].T + state["_fc.bias"]
    torch.testing.assert_close(
        EfficientNetLite0Classifier(weights=str(weights))(pixels), expected, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (9, 5, 1), (4, 1, 1)])
def test_same_padding_keeps_ceil_of_size_over_stride(size: int, kernel: int, stride: int) -> None:
    conv = SamePadConv(1, 1, kernel, stride=stride)
    assert conv(torch.zeros(1, 1, size, size)).shape[2:] == (-(-size // stride),) * 2


def test_the_tower_keeps_to_the_protocol_of_towers_by_import_path() -> None:
    tower = import_encoder("efficientnet_tower:EfficientNetLite0", {"image_size": 64, "pool": 1})
    assert isinstance(tower, EfficientNetLite0)
    assert (tower.hidden_size, tower.image_size) == (1280, 64)


def test_a_weight_file_that_has_gone_leaves_nan_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, weights: Path
) -> None:
    with caplog.at_level(logging.WARNING):
        tower = EfficientNetLite0(weights=str(tmp_path / "gone.pth"), image_size=32)
    assert "gone.pth has gone" in caplog.text
    assert all(bool(parameter.isnan().all()) for parameter in tower.parameters())
    tower.load_state_dict(EfficientNetLite0(weights=str(weights), image_size=32).state_dict())
    assert bool(tower(torch.randn(1, 3, 32, 32)).isfinite().all())


def test_files_that_are_no_weights_of_this_network_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name, reason in [("text", "cannot be read"), ("list", "not a state dict"), ("other", "not an EfficientNet")]:
        with pytest.raises(CheckpointError, match=reason):
            EfficientNetLite0(weights=str(tmp_path / f"{name}.pth"))
    with pytest.raises(CheckpointError, match="does not exist"):
        read_state(tmp_path / "missing.pth")


def test_a_pickle_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"_fc.weight": Path("/")}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        EfficientNetLite0(weights=str(tmp_path / "code.pth"))


@pytest.mark.parametrize(("size", "pool"), [(100, 0), (0, 0), (64, 3), (64, -1)])
def test_sizes_that_do_not_fit_are_refused(size: int, pool: int) -> None:
    with pytest.raises(ConfigError, match="must be"):
        EfficientNetLite0(image_size=size, pool=pool)
