"""A dense layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenmill import kernels
from tokenmill.quant import weight as quantized

__all__ = ["Linear"]


@dataclass(frozen=True)
class Linear:
    """``y = x @ weight^T + bias``."""

    weight: Tensor | quantized.Quantized
    """[N, K]; a quantized one computes with whole numbers; see `quant.weight.linear`."""
    bias: Tensor | None = None
    """[N], of the weight's type."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] to [T, N], same type."""
        if isinstance(self.weight, quantized.Quantized):
            return quantized.linear(x, self.weight, self.bias)
        return kernels.linear(x, self.weight, self.bias)
