"""gelu_mul: the gate of a GeGLU block (Shazeer, arXiv 2002.05202), with the tanh approximation of GELU (Hendrycks and
Gimpel, arXiv 1606.08415) that Gemma uses.

    gelu_mul(x[T, 2I]) -> [T, I] in x.dtype

    y = gelu(x[:, :I]) * x[:, I:], with gelu(a) = a/2 * (1 + tanh(sqrt(2/pi) * (a + 0.044715 a^3))), in float32, rounded
    once at the end.

Nothing is mutated. A row's result does not depend on the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["cases", "reference"]


def reference(x: Tensor) -> Tensor:
    """See the module's docstring."""
    gate, up = x.float().chunk(2, dim=-1)
    # Not torch's gelu: it rounds the last elements of a vector loop differently, so a value would depend on its place.
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
    return (0.5 * gate * (1 + torch.tanh(inner)) * up).to(x.dtype)


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Named positional arguments."""
    random = torch.Generator().manual_seed(0)
    for name, rows, inner, scale, dtype in (
        ("one", 1, 1, 1.0, torch.float32),
        ("odd", 5, 37, 1.0, torch.float32),
        ("wide", 3, 1025, 1.0, torch.float32),
        ("saturated", 4, 33, 100.0, torch.float32),
        ("tiny_values", 4, 33, 1e-6, torch.float32),
        ("no_rows", 0, 16, 1.0, torch.float32),
        ("bfloat16", 7, 65, 3.0, torch.bfloat16),
    ):
        yield name, ((torch.randn(rows, 2 * inner, generator=random) * scale).to(dtype),)
