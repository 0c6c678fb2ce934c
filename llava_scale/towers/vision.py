"""Any transformers vision model, or any module by import path, as a vision tower.

Legend: ``B`` pictures, ``N`` tokens, ``D`` width, ``H``/``W`` pixels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from llava_scale.errors import ConfigError, ShapeError
from llava_scale.towers.base import PixelNormalizer, import_encoder, remember_constants
from llava_scale.towers.patches import use_patch_products

FeatureSelect = Literal["patch", "full"]

_FINAL_NORMS = ("post_layernorm", "layernorm", "norm", "final_layernorm", "final_layer_norm", "layer_norm")


class VisionTower(nn.Module):
    """Pictures to features: normalise, encode, select.

    Args:
        image_size: Side in pixels of the square pictures it will get.
        image_mean: Per channel, of pixels in [0, 1].
        image_std: Per channel, of pixels in [0, 1].
        feature_select: ``patch`` keeps the grid only; ``full`` also the class and register tokens before it.
    """

    hidden_size: int
    num_prefix_tokens: int
    """Tokens that the encoder puts before the grid: class token, registers."""

    def __init__(
        self, *, image_size: int, image_mean: Sequence[float], image_std: Sequence[float], feature_select: FeatureSelect
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.feature_select = feature_select
        self.normalize = PixelNormalizer(image_mean, image_std)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of features for a picture of ``height`` x ``width`` pixels."""
        raise NotImplementedError

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Features ``(B, prefix + rows * columns, D)`` of normalised pictures."""
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        """Features of one picture of ``image_size``, as ``forward`` returns them."""
        rows, cols = self.grid(self.image_size, self.image_size)
        return rows * cols + (self.num_prefix_tokens if self.feature_select == "full" else 0)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Features ``(B, N, D)`` in raster order.

        Args:
            pixels_BCHW: uint8 RGB, scaled and normalised here; or float, taken as normalised already.

        Raises:
            ShapeError: the pictures are not RGB squares of ``image_size``.
        """
        side = self.image_size
        if pixels_BCHW.ndim != 4 or pixels_BCHW.shape[1:] != (3, side, side):
            raise ShapeError(f"pictures must be (B, 3, {side}, {side}), got {tuple(pixels_BCHW.shape)}")
        parameter = next(self.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        features = self.encode(self.normalize(pixels_BCHW, dtype))
        return features if self.feature_select == "full" else features[:, self.num_prefix_tokens :]


class TransformersVisionTower(VisionTower):
    """A transformers vision model, cut at the layer whose features are used.

    Blocks above that layer, the final norm and pooling heads are dropped: the last hidden state then equals
    ``hidden_states[feature_layer]`` of the whole model, as LLaVA uses it, and no parameter is left without gradient.
    A convolutional model is cut between its stages. Where no stack of blocks or stages is found, the model is used
    whole, with ``feature_layer`` -1.

    Args:
        config: Of the vision model.
        feature_layer: Number of the hidden state, 0 being the embeddings; negative counts from the last.
        image_size: Side of the pictures; if it is not the model's own, position embeddings are interpolated.
        image_mean: Per channel, of pixels in [0, 1].
        image_std: Per channel, of pixels in [0, 1].
        feature_select: ``patch`` drops class and register tokens.
        model: Model with weights to cut; a fresh one if None.

    Raises:
        ConfigError: no such layer, or the model cannot take ``image_size``.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        feature_layer: int,
        image_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        feature_select: FeatureSelect,
        model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(
            image_size=image_size, image_mean=image_mean, image_std=image_std, feature_select=feature_select
        )
        self.model = AutoModel.from_config(config) if model is None else model
        cut_at_layer(self.model, feature_layer)
        use_patch_products(self.model)
        self._call_kwargs = self.size_kwargs(self.model, image_size)
        shape = _output_shape(config, feature_layer, image_size, self._call_kwargs)
        self.hidden_size = shape[1] if len(shape) == 4 else shape[2]
        patch = _patch_size(config)
        self._own_grid, self.num_prefix_tokens = _read_grid(shape, patch, image_size)
        # A convolutional model's patch_size is the stride of its first stage only.
        self._patch = patch if patch and self._own_grid[0] == image_size // patch else None

    @staticmethod
    def size_kwargs(model: PreTrainedModel, image_size: int) -> dict[str, Any]:
        """What ``model`` must be told to take pictures of ``image_size``.

        Raises:
            ConfigError: it takes pictures of its own size only.
        """
        if getattr(model.config, "image_size", None) is None or own_image_size(model.config) == image_size:
            return {}
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            return {"interpolate_pos_encoding": True}
        if hasattr(getattr(model, "embeddings", None), "interpolate_pos_encoding"):
            return {}
        raise ConfigError(
            f"{type(model).__name__} takes pictures of {own_image_size(model.config)} pixels and cannot interpolate "
            f"its positions to model.image_size={image_size}; set it to 0"
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of features for a picture of ``height`` x ``width`` pixels."""
        if (height, width) == (self.image_size, self.image_size):
            return self._own_grid
        if self._patch is None:
            raise ConfigError(f"this vision tower takes pictures of {self.image_size} pixels only")
        return height // self._patch, width // self._patch

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Features ``(B, prefix + rows * columns, D)`` of normalised pictures."""
        features: Tensor = self.model(pixel_values=pixels_BCHW, **self._call_kwargs).last_hidden_state
        return as_tokens(features)


class CustomVisionTower(VisionTower):
    """A tower of the user's own, by import path; see ``towers.base``.

    Args:
        import_path: ``package.module:Class``.
        kwargs: Arguments of its constructor.
        image_size: Side of the pictures.
        image_mean: Per channel, of pixels in [0, 1].
        image_std: Per channel, of pixels in [0, 1].
        feature_select: The module returns the grid only, so both choices give the same.

    Raises:
        ConfigError: no such module, or it does not keep to the protocol.
    """

    def __init__(
        self,
        import_path: str,
        kwargs: dict[str, Any],
        *,
        image_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        feature_select: FeatureSelect,
    ) -> None:
        super().__init__(
            image_size=image_size, image_mean=image_mean, image_std=image_std, feature_select=feature_select
        )
        # Real memory even while a checkpoint is being loaded: only the module knows its constants.
        with torch.device("cpu"):
            self.model = cast("Any", import_encoder(import_path, kwargs))
        remember_constants(self.model)
        self.hidden_size = int(self.model.hidden_size)
        self.num_prefix_tokens = 0

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of features for a picture of ``height`` x ``width`` pixels."""
        rows, cols = self.model.grid(height, width)
        return int(rows), int(cols)

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Features ``(B, rows * columns, D)`` of normalised pictures."""
        features: Tensor = self.model(pixels_BCHW)
        rows, cols = self.grid(*pixels_BCHW.shape[2:])
        expected = (pixels_BCHW.shape[0], rows * cols, self.hidden_size)
        if features.shape != expected:
            raise ShapeError(
                f"{type(self.model).__name__} returned {tuple(features.shape)}, but its grid {rows} x {cols} and "
                f"width {self.hidden_size} promise {expected}"
            )
        return features


def as_tokens(features: Tensor) -> Tensor:
    """Features ``(B, N, D)`` of a tower that gives these, or a map ``(B, D, rows, columns)``."""
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def cut_at_layer(model: PreTrainedModel, feature_layer: int) -> None:
    """Drop everything from ``model`` that ``hidden_states[feature_layer]`` does not need, in place.

    Raises:
        ConfigError: the model has no such layer, or no plain stack of blocks to cut.
    """
    stack = _block_stack(model)
    if stack is None:
        if feature_layer != -1:
            raise ConfigError(
                f"{type(model).__name__} is not a plain stack of blocks, so it cannot be cut at layer {feature_layer}; "
                "set model.vision_feature_layer=-1 to use its last features"
            )
        return
    owner, name, blocks = stack
    keep = feature_layer if feature_layer >= 0 else len(blocks) + 1 + feature_layer
    if not 0 <= keep <= len(blocks):
        raise ConfigError(
            f"model.vision_feature_layer is {feature_layer}, but {type(model).__name__} has hidden states "
            f"0 to {len(blocks)} (or -1 to -{len(blocks) + 1})"
        )
    setattr(owner, name, nn.ModuleList(list(blocks)[:keep]))
    for norm in _FINAL_NORMS:
        if isinstance(getattr(model, norm, None), nn.Module):
            setattr(model, norm, nn.Identity())
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None
    embeddings = getattr(model, "embeddings", None)
    if embeddings is not None and isinstance(getattr(embeddings, "mask_token", None), nn.Parameter):
        embeddings.mask_token = None
    if getattr(model, "use_head", False):
        model.use_head = False
        del model.head


def _block_stack(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """Module that owns the blocks, their name in it, and the blocks."""
    depth = getattr(model.config, "num_hidden_layers", None)
    for owner in (model, *(child for name, child in model.named_children() if name in ("encoder", "transformer"))):
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth and len({type(block) for block in child}) == 1:
                return owner, name, child
    return None


def own_image_size(config: PreTrainedConfig) -> int:
    """Side of the square pictures that the model was made for.

    Raises:
        ConfigError: the config names no size, or one that is not square.
    """
    size = getattr(config, "image_size", None)
    sides = {int(side) for side in size} if isinstance(size, list | tuple) else {size}
    side = sides.pop()
    if sides or not isinstance(side, int):
        raise ConfigError(f"{type(config).__name__} names no square image_size ({size}); set model.image_size")
    return side


def _patch_size(config: PreTrainedConfig) -> int | None:
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, list | tuple) and len(set(patch)) == 1:
        patch = patch[0]
    return patch if isinstance(patch, int) else None


def _output_shape(
    config: PreTrainedConfig, feature_layer: int, image_size: int, kwargs: dict[str, Any]
) -> tuple[int, ...]:
    """Shape of the cut model's features for one picture, from a pass without memory or arithmetic."""
    with torch.device("meta"), torch.no_grad():
        model = AutoModel.from_config(config)
        cut_at_layer(model, feature_layer)
        pixels = torch.empty(1, 3, image_size, image_size, dtype=model.dtype)
        return tuple(model.eval()(pixel_values=pixels, **kwargs).last_hidden_state.shape)


def _read_grid(shape: tuple[int, ...], patch: int | None, image_size: int) -> tuple[tuple[int, int], int]:
    """Grid of the features, and how many tokens stand before it."""
    if len(shape) == 4:
        return (shape[2], shape[3]), 0
    side = image_size // patch if patch else math.isqrt(shape[1])
    if not 0 <= shape[1] - side * side <= 16:
        side = math.isqrt(shape[1])
    return (side, side), shape[1] - side * side
