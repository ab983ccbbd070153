"""Cosines and sines of rotary position embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Rotary"]


class Rotary:
    """Turns positions into the angles that `kernels.rope` rotates by (arXiv 2104.09864).

    Computed for the positions at hand, once per forward pass: a table for every position that a model reaches would be
    read for a few rows at a time and weigh more than a small model's layers.

    Args:
        frequencies: radians per position of each of the R/2 pairs of dimensions.
        factor: multiplies cosine and sine; scalings of the context use it to sharpen attention.
        device: where positions will be.
    """

    def __init__(self, frequencies: Sequence[float], factor: float, device: torch.device) -> None:
        self._frequencies = torch.tensor(frequencies, dtype=torch.float32, device=device)
        self._factor = factor

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [T] int64 to cosine and sine, both [T, R/2] float32."""
        angles = positions.unsqueeze(1) * self._frequencies
        cos, sin = angles.cos(), angles.sin_()
        return (cos, sin) if self._factor == 1.0 else (cos.mul_(self._factor), sin.mul_(self._factor))
