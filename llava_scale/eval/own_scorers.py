"""Scorers of your own, by import path: ``scorer: package.module:function`` in a task file.

::

    from llava_scale.eval.own_scorers import scorer

    @scorer
    def same_length(answers, references):
        return [float(len(answer) in map(len, golds)) for answer, golds in zip(answers, references)]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TypeVar

from llava_scale.errors import ConfigError

Points = Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[float]]
"""All answers of a task and the right answers of each to the points of each, usually 0 to 1. The score is the mean."""

_MARK = "is_llava_scale_scorer"
_Function = TypeVar("_Function", bound=Points)


def scorer(function: _Function) -> _Function:
    """Mark ``function`` as a scorer: task files may call it, and nothing else that happens to be installed.

    It gets all answers of a task in one call, so scores that need the whole task (as CIDEr does) can be written too.
    It must depend on nothing else, so that any number of processes gives the same score.
    """
    setattr(function, _MARK, True)
    return function


def find_scorer(import_path: str) -> Points:
    """The scorer that ``package.module:function`` names.

    Raises:
        ConfigError: the module or function is missing, or it is not marked as a scorer.
    """
    module_name, _, name = import_path.partition(":")
    try:
        found: Points = getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"scorer {import_path!r} cannot be imported ({error}); its module must be installed or on PYTHONPATH"
        ) from None
    if not (callable(found) and getattr(found, _MARK, False)):
        raise ConfigError(f"{import_path!r} is no scorer: mark the function with @llava_scale.eval.own_scorers.scorer")
    return found


def points_of(import_path: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Points of each answer by the scorer that ``import_path`` names.

    Raises:
        ConfigError: there is no such scorer, or it does not return a finite number for each answer.
    """
    points = list(find_scorer(import_path)(answers, references))
    if len(points) != len(answers):
        raise ConfigError(f"scorer {import_path!r} returned {len(points)} points for {len(answers)} answers")
    try:
        values = [float(value) for value in points]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scorer {import_path!r} must return numbers: {error}") from None
    if not all(map(math.isfinite, values)):
        raise ConfigError(f"scorer {import_path!r} returned points that are not finite")
    return values
