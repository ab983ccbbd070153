"""A weight in whole numbers, what a format is, and the plain torch arithmetic over such weights.

Every format stores its weights its own way and computes alike. What is stored stands for whole numbers w8 in -127..127
and one scale per output:

    weight[n, k] = scales[n] * w8[n, k]

Activations are rounded to whole numbers per token when they arrive, so a product is a sum of whole numbers, which is
exact in any order: a row's result cannot depend on the rows around it. Or they stay bfloat16, which holds every w8 too:
then a product is a sum in float32, in an order that is fixed. Native kernels compute the same sums; `linear` is what
they are compared with, and what runs where there are none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill import kernels

__all__ = ["LIMIT", "Format", "Quantized", "linear", "quantize_rows", "rows", "whole_numbers"]

LIMIT = 127
"""The largest whole number, of weights and of activations."""

_EXACT = 1024
"""Products of whole numbers up to `LIMIT` that float32 adds without rounding: 1024 * 127^2 < 2^24."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight [N, K]. Rows are independent of each other, so weights can be made and joined row by row."""

    q: Tensor
    """Without groups int8 [N, K], w8 itself. With groups uint8 [N, K'/2] of 4-bit numbers, the even column in the low
    half of a byte; K' is K filled up to whole groups."""
    scales: Tensor
    """[N] float32"""
    inputs: int
    """K"""
    group: int = 0
    """Inputs that share a multiplier and an offset; 0 is none."""
    multipliers: Tensor | None = None
    """[N, K'/group] uint8, m of the group: ``w8 = floor(q * m / 16) - b``."""
    offsets: Tensor | None = None
    """[N, K'/group] uint8, b of the group; None stands for ``floor(m / 2)``, which makes q = 8 a zero."""
    activations: str = "int8"
    """What the inputs of a product are rounded to: ``int8``, each row to its own scale, or ``bf16``."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.inputs

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each of the N * K weights, scales and all."""
        return 8 * self.nbytes / (self.shape[0] * self.inputs)

    def __getitem__(self, chosen: slice | Tensor) -> Quantized:
        """Some of the rows."""
        return dataclasses.replace(self, **{name: tensor[chosen] for name, tensor in self._tensors().items()})

    @staticmethod
    def cat(parts: Sequence[Quantized]) -> Quantized:
        """The rows of all parts; one part is handed back as it is.

        Raises:
            ValueError: the parts differ in inputs or groups.
        """
        if len({(part.inputs, part.group) for part in parts}) != 1:
            raise ValueError("rows of different formats cannot be one weight")
        if any(part.offsets is not None for part in parts):
            parts = [part._with_offsets() for part in parts]
        if len(parts) == 1:
            return parts[0]
        stored = [part._tensors() for part in parts]
        joined: dict[str, Any] = {name: torch.cat([each[name] for each in stored]) for name in stored[0]}
        return dataclasses.replace(parts[0], **joined)

    def _with_offsets(self) -> Quantized:
        if self.offsets is not None or self.multipliers is None:
            return self
        return dataclasses.replace(self, offsets=self.multipliers >> 1)

    def digits(self) -> Tensor:
        """The 4-bit numbers of a weight with groups, [N, K'] uint8."""
        return torch.stack((self.q & 15, self.q >> 4), dim=-1).flatten(1)

    def whole(self) -> Tensor:
        """w8, [N, K] int8."""
        if self.multipliers is None:
            return self.q
        groups = torch.unflatten(self.digits(), 1, (-1, self.group))
        return whole_numbers(groups, self.multipliers, self.offsets).flatten(1)[:, : self.inputs]

    def dequantize(self) -> Tensor:
        """[N, K] float32, exactly what is computed with."""
        return self.whole() * self.scales.unsqueeze(1)

    def _tensors(self) -> dict[str, Any]:
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def whole_numbers(digits: Tensor, multipliers: Tensor, offsets: Tensor | None) -> Tensor:
    """w8 of 4-bit numbers.

    Args:
        digits: [N, groups, group] uint8, 0..15.
        multipliers: [N, groups] uint8.
        offsets: [N, groups] uint8, or None; see `Quantized`.

    Returns:
        [N, groups, group] int8.
    """
    if offsets is None:
        offsets = multipliers >> 1
    steps = digits.short().mul_(multipliers.unsqueeze(-1)).bitwise_right_shift_(4)
    return steps.sub_(offsets.unsqueeze(-1)).char()


class Format(Protocol):
    """A way to store weights; a file of `formats/` defines one as ``FORMAT``."""

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Quantized:
        """Rounds a weight.

        Args:
            weight: [N, K] float32.
            importance: [K] float32, what an error of each input weighs, such as the mean square of its activations;
                None weighs all alike.
        """


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds activations, each row to its own scale: the largest magnitude becomes `LIMIT`.

    Args:
        x: [T, K], any float type.

    Returns:
        Whole numbers [T, K] float32 and scales [T] float32, ``x = whole * scales``. A row with NaN or infinity has a
        scale of NaN, so that all its results are NaN.
    """
    x = x.float()
    largest = x.abs().amax(dim=1)
    usable = largest.isfinite()
    # The inverse of the smallest subnormal numbers is infinite: rows that small become zero.
    inverse = torch.where(usable & (largest > 1e-35), LIMIT / largest, 0)
    whole = torch.where(inverse.unsqueeze(1) > 0, x * inverse.unsqueeze(1), 0).round_()
    return whole, torch.where(usable, largest / LIMIT, torch.nan)


def linear(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """``x @ weight^T + bias`` over the whole numbers of the weight, scaled once for each output.

    Args:
        x: [T, K], any float type.
        bias: [N], any float type.

    Returns:
        [T, N] of x's type. A row's result is bit-equal whatever the other rows are.
    """
    columns = weight.whole()
    if weight.activations == "bf16":
        result = kernels.linear(x.bfloat16().float(), columns.float(), None) * weight.scales
    else:
        whole, row_scales = quantize_rows(x)
        total = torch.zeros(x.shape[0], columns.shape[0], dtype=torch.int32, device=x.device)
        for start in range(0, weight.inputs, _EXACT):
            span = slice(start, start + _EXACT)
            total += F.linear(whole[:, span], columns[:, span].float()).int()
        result = total.float() * weight.scales * row_scales.unsqueeze(1)
    return (result if bias is None else result + bias.float()).to(x.dtype)


def rows(weight: Quantized, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding table.

    Args:
        indices: [T] int64.

    Returns:
        [T, K] of `dtype`, new memory.
    """
    return weight[indices].dequantize().to(dtype)
