"""Root-mean-square normalisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenmill import kernels

__all__ = ["RMSNorm"]


@dataclass(frozen=True)
class RMSNorm:
    """Scales each row to unit root mean square, then each of its elements by a weight (arXiv 1910.07467)."""

    weight: Tensor
    """[H] float32"""
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., H] to the same shape and type."""
        return kernels.rms_norm(x, self.weight, self.eps)
