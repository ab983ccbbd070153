"""rms_norm: scale each row to unit root mean square (Zhang and Sennrich, arXiv 1910.07467).

    rms_norm(x[..., H], weight[H], eps) -> [..., H] in x.dtype

    y = x * rsqrt(mean(x^2) + eps) * weight, in float32, rounded once at the end.

x and weight may have any floating dtype. Nothing is mutated. A row's result does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["cases", "reference"]


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See the module's docstring."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Named positional arguments."""
    random = torch.Generator().manual_seed(0)
    for name, shape, dtype, scale in (
        ("one", (1, 1), torch.float32, 1.0),
        ("odd", (5, 37), torch.float32, 1.0),
        ("heads", (3, 4, 64), torch.float32, 1.0),
        ("wide", (2, 1025), torch.float32, 1.0),
        ("tiny_values", (3, 48), torch.float32, 1e-6),
        ("huge_values", (3, 48), torch.float32, 1e15),
        ("no_rows", (0, 16), torch.float32, 1.0),
        ("bfloat16", (7, 129), torch.bfloat16, 3.0),
    ):
        x = (torch.randn(shape, generator=random) * scale).to(dtype)
        yield name, (x, torch.randn(shape[-1], generator=random).to(dtype), 1e-6)
