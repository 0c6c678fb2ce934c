"""What every audio tower offers, and how sounds of any length become windows for it.

A sound is cut into windows of at most the tower's longest input; the last one is shorter. A window below the tower's
shortest input is filled up with silence. Token counts follow from sample counts alone, so rows can be planned before a
sound is decoded.

Legend: ``W`` windows, ``N`` tokens, ``D`` width, ``S`` samples, ``T`` frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_scale.errors import SampleError, ShapeError
from llava_scale.types import AudioFeatures, stacked_windows


class AudioFrontend(ABC):
    """Sound to features, without weights: small, picklable, used in loader workers.

    Attributes:
        sample_rate: Samples a second of the sounds it takes.
        window_samples: Samples of the longest window.
        min_samples: Samples of the shortest window; shorter ones are filled up with silence.
    """

    sample_rate: int
    window_samples: int
    min_samples: int

    @abstractmethod
    def features(self, wave: Tensor) -> Tensor:
        """Features ``(T, ...)`` of one window ``(S,)``, ``min_samples <= S <= window_samples``."""

    @abstractmethod
    def window_tokens(self, lengths: Tensor) -> Tensor:
        """Tokens of windows of ``lengths`` samples: int64, same shape, at least 1 each."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever features or token counts could change."""

    def window_lengths(self, num_samples: int) -> list[int]:
        """Samples of each window of a sound.

        Raises:
            SampleError: a sound without samples.
        """
        if num_samples < 1:
            raise SampleError("the sound has no samples; remove it or the sample")
        full, rest = divmod(num_samples, self.window_samples)
        lengths = [self.window_samples] * full
        return [*lengths, max(rest, self.min_samples)] if rest else lengths

    def num_tokens(self, num_samples: int) -> int:
        """Tokens of a sound of ``num_samples`` samples.

        Raises:
            SampleError: a sound without samples.
        """
        lengths = self.window_lengths(num_samples)
        few = torch.tensor([lengths[0], lengths[-1]])
        first, last = self.window_tokens(few).tolist()
        return int(first * (len(lengths) - 1) + last)

    def num_samples(self, duration_s: float) -> int:
        """Samples that a sound is taken to have whose container says ``duration_s``."""
        return round(duration_s * self.sample_rate)

    def __call__(self, wave: Tensor) -> AudioFeatures:
        """Windows of one sound, float ``(S,)`` in [-1, 1] at ``sample_rate``.

        Raises:
            SampleError: a sound without samples.
            ShapeError: not one channel.
        """
        if wave.ndim != 1:
            raise ShapeError(f"a sound must be (samples,), one channel; got {tuple(wave.shape)}")
        lengths = self.window_lengths(len(wave))
        wave = functional.pad(wave.float(), (0, sum(lengths) - len(wave)))
        windows = [self.features(window) for window in torch.split(wave, lengths)]
        return AudioFeatures(stacked_windows(windows), torch.tensor(lengths))


class AudioTower(nn.Module):
    """Windows of sound to features; a compressor and projector may follow.

    Attributes:
        hidden_size: Width of the features.
        frontend: What makes its input.
    """

    hidden_size: int
    frontend: AudioFrontend

    @property
    def sample_rate(self) -> int:
        """Samples a second of the sounds it takes."""
        return self.frontend.sample_rate

    @property
    def max_seconds(self) -> float:
        """Seconds of the longest window."""
        return self.frontend.window_samples / self.frontend.sample_rate

    def num_tokens(self, num_samples: Tensor) -> Tensor:
        """Tokens of whole sounds of ``num_samples`` samples: int64, same shape."""
        counts = [self.frontend.num_tokens(number) for number in num_samples.flatten().tolist()]
        return torch.tensor(counts, dtype=torch.int64).view(num_samples.shape)

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(W, N, D)`` and which of them are real, bool ``(W, N)``: ``valid.sum(1)`` is the window's count.

        Args:
            values: As in ``AudioFeatures``.
            lengths: As in ``AudioFeatures``.
        """
        raise NotImplementedError

    def encode(self, features: AudioFeatures) -> Tensor:
        """Real features of all windows end to end, ``(sum of tokens, D)``; a sound's own lie together, in order."""
        x, valid = self.forward(features.values, features.lengths)
        return x[valid]

    def train(self, mode: bool = True) -> AudioTower:
        """As ``nn.Module.train``, but a frozen tower stays in evaluation mode: no dropout, no dropped layers."""
        tuned = any(parameter.requires_grad for parameter in self.parameters())
        super().train(mode and tuned)
        return self


def join_features(sounds: Sequence[AudioFeatures]) -> AudioFeatures:
    """Windows of several sounds as one batch (``AudioFeatures.joined``)."""
    return AudioFeatures.joined(sounds)


def tokens_valid(counts: Tensor, width: int) -> Tensor:
    """Bool ``(W, width)``: the first ``counts[i]`` places of row i."""
    return torch.arange(width, device=counts.device) < counts[:, None]
