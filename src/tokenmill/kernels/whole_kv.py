"""Keys and values as whole numbers: how one head of one token is kept in an int8 cache.

D elements become D int8 and one float32 scale in the four bytes behind them, so a cache of heads D wide is a tensor of
int8 [B, Hk, S, D + 4]. What is meant is ``element * scale``; the scale is a 127th of the largest magnitude. An element
that is not finite makes the scale NaN, so it is not forgotten; what has no element of at least 1e-30 counts as zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SCALE_BYTES", "dequantize", "quantize"]

SCALE_BYTES = torch.float32.itemsize
"""Bytes behind the elements of a head."""
_LARGEST = 127
_LEAST_BOUND = 1e-30  # far from where scales lose bits


def quantize(x: Tensor) -> Tensor:
    """[..., D] of any floating type to int8 [..., D + 4]."""
    x = x.float()
    finite = x.isfinite().all(dim=-1, keepdim=True)
    bound = torch.where(finite, x, 0).abs().amax(dim=-1, keepdim=True)
    some = bound >= _LEAST_BOUND
    scales = torch.where(some, bound / _LARGEST, 0)
    elements = torch.where(some & finite, (x / scales).round(), 0).to(torch.int8)
    scales = scales.masked_fill(~finite, float("nan"))
    return torch.cat((elements, scales.view(torch.int8)), dim=-1)


def dequantize(rows: Tensor) -> Tensor:
    """int8 [..., D + 4] to float32 [..., D]."""
    # A copy, because a view needs bytes that begin at a multiple of four.
    scales = rows[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return rows[..., :-SCALE_BYTES] * scales
