"""The numbers that the weights of a group may become, and rounding to them.

A group of inputs of one output shares a scale s and a whole number z, and stands for ``(q - z) * s`` with q of `bits`
bits. The whole range of a group is seldom the best: leaving its outermost weights a little short makes all steps finer.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tokenmill.quant.scheme import Scheme

__all__ = ["fit", "limits", "nearest"]

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of either side of a group's range that are tried."""


def limits(scheme: Scheme) -> tuple[int, int]:
    """Least and largest q. A symmetric range has as many steps on either side."""
    half = 1 << (scheme.bits - 1)
    return (1 - half if scheme.symmetric else -half), half - 1


def nearest(w: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """q, float32 whole numbers, of weights w; scales and zeros broadcast over w."""
    low, high = limits(scheme)
    return (w * torch.where(scales > 0, 1 / scales, 0)).round_().add_(zeros).clamp_(low, high)


def fit(w: Tensor, importance: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scales and zeros with the least weighted squared error of rounding that was found.

    Args:
        w: [..., group] float32.
        importance: broadcasts over w; what an error of each input weighs.

    Returns:
        Scales, numbers that bfloat16 can hold, and zeros, both [...] float32. Where all weights are 0 so is the scale.
    """
    low, high = limits(scheme)
    below, above = w.amin(-1, keepdim=True).clamp_(max=0), w.amax(-1, keepdim=True).clamp_(min=0)
    if scheme.symmetric:
        above = torch.maximum(-below, above)
        ranges = [(-above * share, above * share) for share in _SHARES]
    else:
        ranges = [(below * first, above * second) for first, second in itertools.product(_SHARES, _SHARES)]
    best = torch.full_like(below, torch.inf)
    scales, zeros = torch.zeros_like(below), torch.zeros_like(below)
    for start, stop in ranges:
        step = (stop - start) / (high - low)
        zero = (low - start * torch.where(step > 0, 1 / step, 0)).round_().clamp_(low, high)
        steps = nearest(w, step, zero, scheme) - zero
        along, length = ((each * steps * importance).sum(-1, keepdim=True) for each in (w, steps))
        step = torch.where(length > 0, along / length, step).bfloat16().float()
        error = (steps * step - w).square_().mul_(importance).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, step, scales), torch.where(better, zero, zeros)
    return scales.squeeze(-1), zeros.squeeze(-1)
