"""Norms, gates and rotations of bfloat16 rows: what the operations of the same names do, in float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.cpu import _native

__all__ = ["gelu_mul", "rms_norm", "rms_norm_add", "rope", "silu_mul"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.rms_norm`: x [..., H] bfloat16, contiguous, and weight [H] float32 to the shape and type of x."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    _native.rms_norm(x.data_ptr(), weight.data_ptr(), eps, x.numel() // width, width, out.data_ptr())
    return out


def rms_norm_add(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    """Adds ``rms_norm(x, weight, eps)`` to the residual [..., H] bfloat16 in place, rounded once. Returns it."""
    width = x.shape[-1]
    _native.rms_norm_add(x.data_ptr(), weight.data_ptr(), eps, x.numel() // width, width, residual.data_ptr())
    return residual


def silu_mul(x: Tensor) -> Tensor:
    """`kernels.silu_mul`: [T, 2I] bfloat16, contiguous, to [T, I]."""
    return _gate(x, _native.Gate.silu)


def gelu_mul(x: Tensor) -> Tensor:
    """`kernels.gelu_mul`: [T, 2I] bfloat16, contiguous, to [T, I]."""
    return _gate(x, _native.Gate.gelu)


def _gate(x: Tensor, activation: _native.Gate) -> Tensor:
    rows, inner = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, inner)
    _native.gate(x.data_ptr(), activation, rows, inner, out.data_ptr())
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.rope`: q [T, Hq, D] and k [T, Hk, D] bfloat16, cos and sin [T, R/2] float32, all contiguous."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _native.rope(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[1], *x.shape, out.data_ptr())
    return out
