"""Choosing tokens by logits, and their log probabilities, without sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.cpu import _native

__all__ = ["sample", "token_logprobs"]


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """`kernels.sample`: logits [R, V] float32 with tokens side by side and contiguous columns [R], to [R] int64.

    Takes the token that the reference takes for the same uniform, unless that lies within rounding of the border
    between two tokens.
    """
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    _native.sample(
        logits.data_ptr(),
        logits.stride(0),
        rows,
        vocabulary,
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        uniform.data_ptr(),
        tokens.data_ptr(),
    )
    return tokens


def token_logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.token_logprobs`: logits [R, V] float32 with tokens side by side, tokens [R] int64, k at most V.

    Among equally likely tokens the lowest id comes first.
    """
    rows, vocabulary = logits.shape
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
