"""When two filter banks are the same but for rounding."""

from __future__ import annotations


def assert_same_loudness(found, expected, *, share=2e-6):
    """Log energies ``(..., T, M)`` as amplitudes: equal to 2e-4, or to ``share`` of the loudest filter of the frame.

    Processors round Fourier transforms differently, and the logarithms that filters are made from. A filter that hears
    next to nothing, or with its edge, holds little but such rounding.
    """
    assert found.shape == expected.shape
    mine, theirs = (energies.double().div(2).exp() for energies in (found, expected))
    loudest = theirs.amax(-1, keepdim=True)
    excess = (mine - theirs).abs() - (2e-4 * theirs).maximum(share * loudest)
    assert excess.max() <= 0, f"{(excess > 0).sum()} of {excess.numel()} filters differ, by up to {excess.max():.3g}"
