"""The feed-forward half of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from tokenmill import kernels
from tokenmill.layers.linear import Linear

__all__ = ["ACTIVATIONS", "GatedMLP"]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"silu": kernels.silu_mul, "gelu_tanh": kernels.gelu_mul}
)
"""[T, 2I] to [T, I]: the activation of the first half times the second."""


@dataclass(frozen=True)
class GatedMLP:
    """``down(activation(gate(x)) * up(x))`` (arXiv 2002.05202), gate and up in one product."""

    gate_up: Linear
    """[2I, H]: the gate's rows, then the rows of up."""
    down: Linear
    """[H, I]"""
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] to [T, H]."""
        return self.down(self.activation(self.gate_up(x)))
