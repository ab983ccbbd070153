"""Choosing tokens by logits without sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.cpu import _native

__all__ = ["sample"]


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """`kernels.sample`: logits [R, V] float32, to [R] int64. Logits whose tokens do not lie side by side are copied.

    A logit that is not a number counts as -inf. Takes the token that the reference takes for the same uniform, unless
    that lies within rounding of the border between two tokens.
    """
    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    columns = [column.contiguous() for column in (temperature, top_k, top_p, min_p, uniform)]
    tokens = torch.empty(rows, dtype=torch.int64)
    _native.sample(
        logits.data_ptr(),
        logits.stride(0),
        rows,
        vocabulary,
        *(column.data_ptr() for column in columns),
        tokens.data_ptr(),
    )
    return tokens
