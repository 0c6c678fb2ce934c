"""Seeds, and random states that survive a restart."""

from __future__ import annotations

import base64
import os
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llava_scale.training.parallel import Ranks


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators; called once at the entry of a run."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int, ranks: Ranks) -> None:
    """Seed as ``seed_everything`` with draws of its own for each rank; the first one's are those of a lone process."""
    seed_everything((seed + 0x9E3779B1 * ranks.rank) % 2**63)


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all global generators as plain JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _encode(torch.get_rng_state()),
    }
    if device.type == "cuda":
        states["cuda"] = _encode(torch.cuda.get_rng_state(device))
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put all global generators back to what ``random_states`` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_decode(states["cuda"]), device)


@contextmanager
def untouched_randomness(device: torch.device) -> Iterator[None]:
    """Let the block draw what it likes; afterwards training draws as if it had not run."""
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(states, device)


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Prefer kernels with a fixed order of summation on CUDA; the CPU's are fixed already.

    Operations without such a kernel warn and run: their last bits may differ between two runs.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
