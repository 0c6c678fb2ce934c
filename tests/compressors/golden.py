"""Stored results of the methods' official code on small random inputs, and what of each belongs to one case."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent.parent / "data" / "compression"


def load(name):
    """All arrays of a file."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def cases(name, prefix="c"):
    """(number, arrays without the prefix) of each case of a file."""
    arrays = load(name)
    numbers = sorted({int(key[len(prefix) :].partition("_")[0]) for key in arrays if key.startswith(prefix)})
    return [
        {key.partition("_")[2]: value for key, value in arrays.items() if key.startswith(f"{prefix}{number}_")}
        for number in numbers
    ]


def assert_same(found, expected):
    """Equal to 1e-12 in float64, 2e-6 in float32, exactly for integers."""
    if not expected.is_floating_point():
        assert torch.equal(found.to(expected.dtype), expected)
        return
    assert found.dtype == expected.dtype
    tolerance = 1e-12 if expected.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
