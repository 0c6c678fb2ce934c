"""Position in the stream -> number of the sample: a pure function of seed and epoch.

Positions run on across epochs: position ``p`` lies in epoch ``p // num_samples``. Within an epoch, blocks of
neighbouring samples are permuted and samples are then shuffled inside windows of a few blocks. Nothing the size of the
data set is held: the permutation of the blocks is computed for each index by a Feistel network.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from llava_scale.errors import ConfigError

IntArray = NDArray[np.int64]
HashArray = NDArray[np.uint64]

_NUM_ROUNDS = 6
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def mix(*words: int) -> int:
    """Hash integers to 64 bits, the same on every machine and in every version of numpy (SplitMix64 finalizer)."""
    state = 0
    for word in words:
        state = (state + (word & _MASK) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
        state ^= state >> 31
    return state


@dataclass(frozen=True)
class Order:
    """The sequence of samples of one data set, without end.

    Each epoch holds every sample exactly once, whatever the sizes. The first sample of an epoch's first block moves
    from epoch to epoch, so neither the blocks nor the ragged last one are the same twice.

    Attributes:
        num_samples: Samples in the data set, at least 1.
        seed: Any integer; another seed gives another sequence.
        block_size: Neighbouring samples that stay together.
        window_blocks: Blocks in a window inside which samples are shuffled.
        shuffle: False gives 0, 1, 2, … in every epoch.
    """

    num_samples: int
    seed: int = 0
    block_size: int = 16
    window_blocks: int = 64
    shuffle: bool = True

    def __post_init__(self) -> None:
        if min(self.num_samples, self.block_size, self.window_blocks) < 1:
            raise ConfigError(
                f"cannot order {self.num_samples} samples in blocks of {self.block_size} and windows of "
                f"{self.window_blocks} blocks: each must be at least 1"
            )

    def window(self, position: int) -> tuple[int, IntArray]:
        """Return the window that holds ``position``: its first position and its sample numbers, in order."""
        epoch, offset = divmod(position, self.num_samples)
        window_size = self.block_size * self.window_blocks
        number = offset // window_size
        first = number * window_size
        size = min(window_size, self.num_samples - first)
        start = epoch * self.num_samples + first
        if not self.shuffle:
            return start, np.arange(first, first + size, dtype=np.int64)
        samples = self._blocks_of(epoch, number, size)
        keys = _mix_array(np.arange(size, dtype=np.uint64), mix(self.seed, epoch, number, 1))
        return start, samples[np.argsort(keys, kind="stable")]

    def samples(self, start: int, stop: int) -> IntArray:
        """Sample numbers at positions ``start`` to ``stop``, over the borders of windows and epochs."""
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            first, numbers = self.window(start)
            part = numbers[start - first : stop - first]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _blocks_of(self, epoch: int, window: int, size: int) -> IntArray:
        """The window's samples before they are shuffled: its blocks, one after the other."""
        slots = np.arange(window * self.window_blocks, window * self.window_blocks + -(-size // self.block_size))
        num_full = self.num_samples // self.block_size
        blocks = slots.astype(np.int64)  # the ragged block, if any, keeps the last slot
        full = slots < num_full
        blocks[full] = permute(blocks[full], num_full, mix(self.seed, epoch, 0))
        positions = (blocks[:, None] * self.block_size + np.arange(self.block_size)).reshape(-1)[:size]
        shift = mix(self.seed, epoch, 2) % self.num_samples
        return np.asarray((positions + shift) % self.num_samples)


def permute(indices: IntArray, size: int, key: int) -> IntArray:
    """Map each of ``indices`` to its place in a pseudorandom permutation of ``range(size)`` chosen by ``key``.

    Generalised Feistel network over a rectangle just larger than ``size``; results outside are mapped again until they
    fall inside, which keeps it a permutation (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    height = max(1, isqrt(max(0, size - 1)) + 1)
    width = max(1, -(-size // height))
    keys = [mix(key, number) for number in range(_NUM_ROUNDS)]
    result = indices.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        result[outside] = _feistel(result[outside], np.uint64(height), np.uint64(width), keys)
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


def _feistel(values: HashArray, height: np.uint64, width: np.uint64, keys: list[int]) -> HashArray:
    row, column = values // width, values % width
    for number, key in enumerate(keys):
        if number % 2:
            row = (row + _mix_array(column, key) % height) % height
        else:
            column = (column + _mix_array(row, key) % width) % width
    return np.asarray(row * width + column)


def _mix_array(values: HashArray, key: int) -> HashArray:
    """SplitMix64 finalizer of ``values + key``, elementwise; uint64 arithmetic wraps by design."""
    mixed = values + np.uint64(mix(key))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_MIX_1)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_MIX_2)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))
