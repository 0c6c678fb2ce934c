"""Compressors of your own, by import path.

Named in the config as ``compressor: {type: custom, import_path: package.module:Class, arguments: {...}}``. Two kinds of
classes will do; both return ``CompressedTokens`` when called with tokens, grid and context (see ``base.Compressor``).

- Without weights: any class, called with ``arguments``, that has ``num_tokens(grid, step)``.
- With weights: an ``nn.Module`` class, called with ``arguments`` and ``in_width``, and with ``instruction_width`` where
  an ``instruction_tower`` is set. Loader workers count tokens without its weights: its class or static method
  ``token_count``, called with ``arguments``, returns something that has ``num_tokens(grid, step)``.

``out_width(in_width)`` is needed where the width changes; ``needs_instruction`` and ``needs_signals`` where they are
true. Checkpoints carry weights, name and arguments, never code.

Legend: ``B`` media, ``N`` tokens in, ``M`` tokens out, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava_scale.compressors.base import EVALUATION, CompressedTokens, Compressor, Context, TokenCount
from llava_scale.config.compressor import CustomConfig
from llava_scale.errors import ConfigError, ShapeError
from llava_scale.types import Grid

Argument = str | int | float | bool


@dataclass(frozen=True, slots=True)
class CustomCount:
    """How many tokens a compressor by import path leaves; goes to loader workers as its name and arguments.

    Attributes:
        import_path: ``package.module:Class``.
        arguments: Names and values of its arguments.
    """

    import_path: str
    arguments: tuple[tuple[str, Argument], ...]

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Tokens of one medium.

        Raises:
            ConfigError: the class cannot be used.
            ShapeError: it announces none.
        """
        number = _counter(self.import_path, self.arguments).num_tokens(grid, step)
        if not isinstance(number, int) or number < 1:
            raise ShapeError(
                f"{self.import_path} announces {number!r} tokens for a grid of {grid}; it must be 1 or more"
            )
        return number


class CustomCompressor(nn.Module):
    """A compressor by import path, held to what it promises.

    Args:
        config: Its name and arguments.
        in_width: D of the tokens it will get.
        instruction_width: Width of the embedded questions; 0 where none are read.

    Raises:
        ConfigError: no such class, it is no compressor, or it refuses its arguments.
    """

    def __init__(self, config: CustomConfig, *, in_width: int, instruction_width: int = 0) -> None:
        super().__init__()
        self.name, self.count = config.import_path, count_of(config)
        arguments: dict[str, Any] = dict(config.arguments)
        found = find_compressor(config.import_path)
        if issubclass(found, nn.Module):
            arguments["in_width"] = in_width
            if instruction_width:
                arguments["instruction_width"] = instruction_width
        # Real memory even while a checkpoint is being loaded: only the class knows its constants.
        with torch.device("cpu"):
            self.inner = cast("Compressor", _called(config.import_path, found, arguments))
        if self.needs_instruction != bool(config.instruction_tower):
            reads = "reads questions" if self.needs_instruction else "reads no questions"
            raise ConfigError(
                f"model.compressor: {self.name} {reads}: "
                f"{'set' if self.needs_instruction else 'leave out'} instruction_tower"
            )

    @property
    def needs_instruction(self) -> bool:
        """Whether it reads questions; it does not unless it says so."""
        return bool(getattr(self.inner, "needs_instruction", False))

    @property
    def needs_signals(self) -> bool:
        """Whether it looks at the tower's attention; it does not unless it says so."""
        return bool(getattr(self.inner, "needs_signals", False))

    def num_tokens(self, grid: Grid, step: int | None) -> int:
        """Tokens of one medium."""
        return self.count.num_tokens(grid, step)

    def out_width(self, in_width: int) -> int:
        """Width of its tokens; as it comes in unless it says otherwise."""
        own = getattr(self.inner, "out_width", None)
        return in_width if own is None else int(own(in_width))

    def forward(self, x_BND: Tensor, grid: Grid, context: Context = EVALUATION) -> CompressedTokens:
        """Compress ``(B, N, D)`` on ``grid`` to ``(B, M, out_width)``.

        Raises:
            ShapeError: it returned something else than it promised.
        """
        out = self.inner(x_BND, grid, context)
        if not isinstance(out, CompressedTokens):
            raise ShapeError(f"{self.name} must return CompressedTokens, got {type(out).__name__}")
        batch, number = x_BND.shape[0], self.num_tokens(grid, context.step)
        wanted = {
            "tokens": (batch, number, self.out_width(x_BND.shape[2])),
            "positions": (batch, number),
            "sizes": (batch, number),
            "group": x_BND.shape[:2],
        }
        for field, shape in wanted.items():
            value = getattr(out, field)
            if value is not None and tuple(value.shape) != tuple(shape):
                raise ShapeError(
                    f"{self.name} returned {field} {tuple(value.shape)} for a grid of {grid}, but its num_tokens and "
                    f"out_width promise {tuple(shape)}"
                )
        return out


def count_of(config: CustomConfig) -> CustomCount:
    """The promise of the compressor that ``config`` names, without weights."""
    return CustomCount(config.import_path, tuple(sorted(config.arguments.items())))


def find_compressor(import_path: str) -> type:
    """The class that ``package.module:Class`` names.

    Only classes that count tokens are ever called, so a checkpoint cannot make this run anything else that happens to
    be installed.

    Raises:
        ConfigError: the module or class is missing, or it is no compressor.
    """
    module_name, _, class_name = import_path.partition(":")
    try:
        found = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"compressor {import_path!r} cannot be imported ({error}); its module must be installed or on PYTHONPATH"
        ) from None
    if not isinstance(found, type):
        raise ConfigError(f"compressor {import_path!r} must be a class")
    method = "token_count" if issubclass(found, nn.Module) else "num_tokens"
    if not (callable(getattr(found, method, None)) and callable(found)):
        kind = "an nn.Module class" if method == "token_count" else "a class without weights"
        signature = "token_count(**arguments)" if method == "token_count" else "num_tokens(grid, step)"
        raise ConfigError(f"compressor {import_path!r} is {kind} and must have {signature}")
    return found


@lru_cache(maxsize=64)
def _counter(import_path: str, arguments: tuple[tuple[str, Argument], ...]) -> TokenCount:
    found: Any = find_compressor(import_path)
    make = found.token_count if issubclass(found, nn.Module) else found
    counter = _called(import_path, make, dict(arguments))
    if not callable(getattr(counter, "num_tokens", None)):
        raise ConfigError(
            f"compressor {import_path!r}: token_count() must return something with num_tokens(grid, step)"
        )
    return cast("TokenCount", counter)


def _called(import_path: str, make: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return make(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"compressor {import_path!r} refuses the arguments {arguments}: {error}") from error
