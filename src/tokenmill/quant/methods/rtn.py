"""Round to nearest: each weight by itself, to the closest number there is. Needs no calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.quant.grid import fit, nearest
from tokenmill.quant.method import Method, Rounded, Statistics
from tokenmill.quant.scheme import Scheme

__all__ = ["METHOD", "quantize"]


def quantize(weight: Tensor, stats: Statistics, scheme: Scheme) -> Rounded:  # noqa: ARG001 - as every method
    """A weight [N, K] float32 to the nearest numbers of each group; `stats` is not looked at."""
    groups = torch.unflatten(weight, 1, (scheme.groups(weight.shape[1]), -1))
    scales, zeros = fit(groups, torch.ones(()), scheme)
    q = nearest(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), scheme)
    return Rounded(q.flatten(1).char(), scales, zeros.char())


METHOD = Method(quantize, calibrated=False)
