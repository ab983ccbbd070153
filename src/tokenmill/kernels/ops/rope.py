"""rope: rotary position embedding (Su et al., arXiv 2104.09864), half-split layout as in GPT-NeoX and Llama.

    rope(q[T, Hq, D], k[T, Hk, D], cos[T, R/2] float32, sin[T, R/2] float32) -> (q[T, Hq, D], k[T, Hk, D])

Dimension i < R/2 of each head is rotated together with dimension i + R/2; dimensions from R on pass through (R <= D,
"partial rotary"). Row t of cos and sin belongs to token t. The math is float32; results have the dtypes of q and k and
are new tensors. A token's result does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["cases", "reference"]


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See the module's docstring."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # the same for every head
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1) if 2 * half < x.shape[-1] else rotated


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Named positional arguments."""
    random = torch.Generator().manual_seed(0)
    for name, tokens, q_heads, k_heads, width, rotary, dtype in (
        ("one", 1, 1, 1, 2, 2, torch.float32),
        ("grouped", 5, 6, 2, 64, 64, torch.float32),
        ("partial", 7, 3, 3, 80, 32, torch.float32),
        ("odd_rest", 3, 2, 1, 33, 10, torch.float32),
        ("no_tokens", 0, 2, 1, 16, 16, torch.float32),
        ("bfloat16", 9, 4, 2, 128, 128, torch.bfloat16),
    ):
        q = torch.randn(tokens, q_heads, width, generator=random).to(dtype)
        k = torch.randn(tokens, k_heads, width, generator=random).to(dtype)
        frequency = 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
        angle = torch.randint(0, 100_000, (tokens, 1), generator=random) * frequency
        yield name, (q, k, angle.cos(), angle.sin())
