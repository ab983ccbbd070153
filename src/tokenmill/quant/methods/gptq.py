"""GPTQ (arXiv 2210.17323): inputs are rounded one after the other, and those to come make up for each error.

What a rounding error costs is what it changes of the layer's outputs, and inputs that go together can stand in for each
other. So after each input the weights of all later inputs move to where the outputs change least. How far is read off
the Hessian H of the outputs' squared error, the mean of ``x x^T`` over calibration tokens: with ``H^-1 = U^T U``, U
upper triangular, an error e of input i is met by ``-e * U[i, j] / U[i, i]`` in input j.

Inputs keep their order, so a group's scale is chosen when its first input's turn comes, for the weights as they then
are, and a checkpoint needs no ``g_idx``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.errors import ModelError
from tokenmill.quant.grid import fit, nearest
from tokenmill.quant.method import Method, Rounded, Statistics
from tokenmill.quant.scheme import Scheme

__all__ = ["METHOD", "quantize"]

_BLOCK = 128
"""Inputs whose errors are gathered before the weights after them move: a whole number of groups of any size."""

_DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean square of all inputs that are added to that of each, so that inputs too much alike to tell apart
stay themselves; more where float32 still cannot invert the matrix."""


def quantize(weight: Tensor, stats: Statistics, scheme: Scheme) -> Rounded:
    """A weight [N, K] float32, rounded so that the outputs for the inputs of `stats` change little.

    Raises:
        ModelError: ``calibration_failed`` when the statistics are not finite.
    """
    factor = _inverse_factor(stats.hessian())
    importance = factor.diagonal().reciprocal().square()
    size = scheme.group or weight.shape[1]
    w = weight.T.contiguous()  # [K, N]: an input's weights lie together
    q = torch.empty_like(w, dtype=torch.int8)
    scales, zeros = (w.new_empty(scheme.groups(w.shape[0]), w.shape[1]) for _ in range(2))
    for start in range(0, len(w), _BLOCK):
        stop = min(start + _BLOCK, len(w))
        errors = w.new_empty(stop - start, w.shape[1])
        for i in range(start, stop):
            group = i // size
            if i % size == 0:
                span = slice(i, i + size)
                scales[group], zeros[group] = fit(w[span].T, importance[span], scheme)
            whole = nearest(w[i], scales[group], zeros[group], scheme)
            q[i] = whole
            error = errors[i - start]
            torch.sub(w[i], (whole - zeros[group]) * scales[group], out=error).div_(factor[i, i])
            w[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return Rounded(q.T.contiguous(), scales.T.contiguous(), zeros.T.char().contiguous())


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with ``U^T U = (hessian + damping)^-1``; changes `hessian`."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    for damping in _DAMPING:
        diagonal.add_(damping * mean)
        # Turned around, the lower factor L of H = L L^T becomes an upper one, whose inverse is U.
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            eye = torch.eye(len(hessian), device=hessian.device)
            inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
            return inverse.flip(0, 1).contiguous()
    raise ModelError("calibration_failed", "The calibration text gave a layer inputs that are NaN or infinite.")


METHOD = Method(quantize, calibrated=True)
