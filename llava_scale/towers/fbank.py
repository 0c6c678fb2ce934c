"""Kaldi's log-mel filter bank in plain torch: batched, on any device, always in float32 or better.

Povey window, frames of 25 ms every 10 ms that lie wholly inside the sound, offset removed, pre-emphasis 0.97, no
dither, power spectrum, triangular filters on Kaldi's mel scale, natural logarithm.

Legend: ``S`` samples, ``T`` frames, ``M`` mel bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from llava_scale.errors import ConfigError, ShapeError

INT16_SCALE = 1 << 15
"""Kaldi's filter bank expects 16-bit integers as samples; sounds here lie in [-1, 1]."""

_PRE_EMPHASIS = 0.97
_POVEY_POWER = 0.85
_FRAMES_AT_ONCE = 512  # what stays in a processor's cache


@dataclass(frozen=True, slots=True)
class Fbank:
    """A filter bank with fixed settings; holds no tensors, so it is picklable and belongs to no device.

    Attributes:
        num_bins: Mel bins ``M``.
        sample_rate: Samples a second.
        frame_ms: Length of a frame.
        shift_ms: Distance of two frames.
        low_hz: Lower edge of the first filter.
        high_hz: Upper edge of the last filter; 0 is half the sample rate.
        window: Kaldi's own ``povey``, or ``hanning``.
        scale: What samples in [-1, 1] are multiplied by first.
    """

    num_bins: int = 128
    sample_rate: int = 16_000
    frame_ms: float = 25.0
    shift_ms: float = 10.0
    low_hz: float = 20.0
    high_hz: float = 0.0
    window: Literal["povey", "hanning"] = "povey"
    scale: float = INT16_SCALE

    def __post_init__(self) -> None:
        if min(self.num_bins, self.sample_rate, self.frame_size, self.shift_size) < 1:
            raise ConfigError(f"num_bins, sample_rate, frame_ms and shift_ms must be positive, got {self}")
        if not 0 <= self.low_hz < self.top_hz <= self.sample_rate / 2:
            raise ConfigError(f"need 0 <= low_hz < high_hz <= half the sample rate, got {self}")

    @property
    def frame_size(self) -> int:
        """Samples of a frame."""
        return int(self.sample_rate * self.frame_ms * 0.001)

    @property
    def shift_size(self) -> int:
        """Samples from one frame to the next."""
        return int(self.sample_rate * self.shift_ms * 0.001)

    @property
    def top_hz(self) -> float:
        """Upper edge of the last filter."""
        return self.high_hz or self.sample_rate / 2

    def num_frames(self, num_samples: int) -> int:
        """Frames of a sound; 0 if it is shorter than one frame."""
        return max(0, 1 + (num_samples - self.frame_size) // self.shift_size)

    def __call__(self, wave: Tensor) -> Tensor:
        """Log energies ``(..., T, M)`` of sounds ``(..., S)`` in [-1, 1]; those of one batch have the same length.

        Float64 stays float64; everything else is computed in float32, also inside autocast: sixteen bits overflow.

        Raises:
            ShapeError: a sound shorter than one frame.
        """
        if wave.shape[-1] < self.frame_size:
            raise ShapeError(f"a filter bank needs {self.frame_size} samples or more, got {wave.shape[-1]}")
        dtype = torch.float64 if wave.dtype == torch.float64 else torch.float32
        with torch.autocast(wave.device.type, enabled=False):
            frames = wave.to(dtype).unfold(-1, self.frame_size, self.shift_size)
            shape = frames.shape[:-1]
            window, filters = _constants(self, dtype, wave.device)
            flat = frames.reshape(-1, self.frame_size) if frames.ndim != 2 else frames
            parts = [_log_energies(part * self.scale, window, filters) for part in torch.split(flat, _FRAMES_AT_ONCE)]
            energies = parts[0] if len(parts) == 1 else torch.cat(parts)
        return energies.view(*shape, self.num_bins)


def _log_energies(frames: Tensor, window: Tensor, filters: Tensor) -> Tensor:
    """``(T, frame_size)`` -> ``(T, M)``, overwriting; each step in Kaldi's order, so that rounding agrees too."""
    frames -= frames.mean(dim=1, keepdim=True)
    emphasis = frames * _PRE_EMPHASIS
    frames[:, 1:] -= emphasis[:, :-1]
    frames[:, :1] -= emphasis[:, :1]
    frames *= window
    spectrum = torch.fft.rfft(frames, n=2 * (filters.shape[0] - 1)).abs().pow_(2)
    return torch.mm(spectrum, filters).clamp_(min=torch.finfo(torch.float32).eps).log_()


@lru_cache(maxsize=32)
def _constants(bank: Fbank, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Window ``(frame_size,)`` and filters ``(padded / 2 + 1, M)``."""
    with torch.inference_mode(False), torch.no_grad():
        window = torch.hann_window(bank.frame_size, periodic=False, dtype=dtype)
        if bank.window == "povey":
            window = window.pow(_POVEY_POWER)
        padded = 1 << (bank.frame_size - 1).bit_length()
        low, high = _mel(bank.low_hz), _mel(bank.top_hz)
        step = (high - low) / (bank.num_bins + 1)
        bins = torch.arange(bank.num_bins)[:, None]
        left, centre, right = low + bins * step, low + (bins + 1.0) * step, low + (bins + 2.0) * step
        hertz = bank.sample_rate / padded * torch.arange(padded // 2)
        mel = (1127.0 * (1.0 + hertz / 700.0).log())[None]
        slopes = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)
        filters = functional.pad(slopes, (0, 1)).to(dtype).T  # the bin at half the sample rate counts for nothing
        return window.to(device), filters.to(device)


def _mel(hertz: float) -> float:
    return 1127.0 * math.log(1.0 + hertz / 700.0)
