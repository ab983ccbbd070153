"""A dense layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenmill import kernels

__all__ = ["Linear"]


@dataclass(frozen=True)
class Linear:
    """``y = x @ weight^T + bias``."""

    weight: Tensor
    """[N, K]"""
    bias: Tensor | None = None
    """[N], of the weight's type."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] to [T, N], same type."""
        return kernels.linear(x, self.weight, self.bias)
