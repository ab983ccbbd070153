"""Penalties for tokens in a row's history, in time that grows with the history and not with the vocabulary."""

from __future__ import annotations

from torch import Tensor

from tokenmill.kernels.cpu import _native

__all__ = ["penalize"]


def penalize(
    logits: Tensor,
    history: Tensor,
    starts: Tensor,
    prompt_lens: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """`kernels.penalize`: mutates logits [R, V] float32, whose tokens lie side by side. Same bits as the reference."""
    if logits.stride(1) != 1:
        raise ValueError("The tokens of a row must lie side by side.")
    columns = [each.contiguous() for each in (history, starts, prompt_lens, repetition, frequency, presence)]
    _native.penalize(logits.data_ptr(), logits.stride(0), *logits.shape, *(column.data_ptr() for column in columns))
