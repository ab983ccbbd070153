"""What a method of rounding weights is, what it knows, and what it gives.

A format says how few bits there are; a method says which of the numbers they can write each weight becomes. Methods run
once, offline: what they give is written as a checkpoint (`quant.compressed_tensors`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.quant.scheme import Scheme
from tokenmill.registry import Registry

__all__ = ["METHODS", "Method", "Rounded", "Statistics"]


@dataclass(frozen=True)
class Rounded:
    """A weight [N, K] in whole numbers: ``weight = (q - zero) * scale``, a zero and a scale to a group of inputs."""

    q: Tensor
    """[N, K] int8, of as many bits as the scheme has: -8..7 or -127..127."""
    scales: Tensor
    """[N, groups] float32, each a number that bfloat16 can hold."""
    zeros: Tensor
    """[N, groups] int8, in the range of q; all 0 if the scheme is symmetric."""

    def dequantize(self) -> Tensor:
        """[N, K] float32."""
        size = -(-self.q.shape[1] // self.scales.shape[1])
        zeros, scales = (
            each.repeat_interleave(size, dim=1)[:, : self.q.shape[1]] for each in (self.zeros, self.scales)
        )
        return (self.q.float() - zeros) * scales

    def split(self, rows: Sequence[int]) -> list[Rounded]:
        """Weights of so many rows each, the first from the top."""
        parts = (torch.split(each, list(rows)) for each in (self.q, self.scales, self.zeros))
        return [Rounded(*part) for part in zip(*parts, strict=True)]


class Statistics:
    """What calibration learns of the inputs of a linear layer: which of them are large, and which go together.

    Args:
        inputs: K.
    """

    def __init__(self, inputs: int) -> None:
        self.tokens = 0
        self._sum = torch.zeros(inputs, inputs)

    def add(self, x: Tensor) -> None:
        """Takes the inputs [T, K], any float type, of T more tokens into account."""
        x = x.float()
        self._sum.addmm_(x.T, x)
        self.tokens += x.shape[0]

    def hessian(self) -> Tensor:
        """Mean of ``x x^T`` over all tokens, [K, K] float32, new memory.

        An error D [N, K] of a weight changes its outputs by ``trace(D hessian D^T)`` in mean square.
        """
        return self._sum / max(1, self.tokens)


@dataclass(frozen=True)
class Method:
    """A way to round weights; a file of `methods/` defines one as ``METHOD``."""

    quantize: Callable[[Tensor, Statistics, Scheme], Rounded]
    """Of a weight [N, K] float32, which stays as it is; K is a whole number of groups."""
    calibrated: bool
    """Whether it looks at the statistics; they may be empty if not."""


METHODS: Registry[Method] = Registry("tokenmill.quant.methods", "methods", "METHOD")
