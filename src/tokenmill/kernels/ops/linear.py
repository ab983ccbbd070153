"""linear: a dense layer.

    linear(x[T, K], weight[N, K], bias[N] or None) -> [T, N] in x.dtype

    y = x @ weight^T + bias, accumulated in at least float32.

x, weight and bias share one dtype. Nothing is mutated. In float32 a row's result is bit-equal whatever the other rows
are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cases", "reference"]

_TILE = 16
"""Rows per float32 matmul. Libraries sum over K in an order that depends on the row count; one count, one order."""


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See the module's docstring."""
    rows = x.shape[0]
    if x.dtype != torch.float32 or rows == 0:
        return F.linear(x, weight, bias)
    outputs = weight.shape[0]
    if outputs < _TILE:  # with fewer the order may depend on the row's place in the tile
        weight = F.pad(weight, (0, 0, 0, _TILE - outputs))
    padded = F.pad(x, (0, 0, 0, -rows % _TILE)).contiguous()
    y = torch.cat([F.linear(tile, weight) for tile in torch.split(padded, _TILE)])[:rows, :outputs]
    return y.contiguous() if bias is None else y + bias


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Named positional arguments."""
    random = torch.Generator().manual_seed(0)
    for name, rows, inputs, outputs, bias, dtype in (
        ("one", 1, 1, 1, False, torch.float32),
        ("odd", 5, 37, 11, True, torch.float32),
        ("whole_tile", 16, 64, 48, False, torch.float32),
        ("tile_and_a_row", 17, 129, 65, True, torch.float32),
        ("many_rows", 50, 96, 33, False, torch.float32),
        ("no_rows", 0, 16, 8, True, torch.float32),
        ("bfloat16", 7, 256, 65, True, torch.bfloat16),
    ):
        x = torch.randn(rows, inputs, generator=random).to(dtype)
        weight = torch.randn(outputs, inputs, generator=random).to(dtype)
        yield name, (x, weight, torch.randn(outputs, generator=random).to(dtype) if bias else None)
