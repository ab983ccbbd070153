"""Log probabilities of tokens without sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.cpu import _native

__all__ = ["token_logprobs"]


def token_logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.token_logprobs`: logits [R, V] float32, tokens [R] int64, k at most V. Copies as `cpu.sample` does.

    Among equally likely tokens the lowest id comes first.
    """
    rows, vocabulary = logits.shape
    logits, tokens = logits if logits.stride(1) == 1 else logits.contiguous(), tokens.contiguous()
    logprobs, ranks = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    top_ids, top_logprobs = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k)
    _native.token_logprobs(
        logits.data_ptr(),
        logits.stride(0),
        rows,
        vocabulary,
        tokens.data_ptr(),
        k,
        logprobs.data_ptr(),
        ranks.data_ptr(),
        top_ids.data_ptr(),
        top_logprobs.data_ptr(),
    )
    return logprobs, ranks, top_ids, top_logprobs
