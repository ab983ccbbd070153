"""The attention half of a layer, over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tokenmill import kernels
from tokenmill.layers.linear import Linear
from tokenmill.layers.norm import RMSNorm

__all__ = ["Attention", "HeadNorm", "KVView", "NoNorm", "QKNorm", "WholeNorm"]


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[T, heads * D] as [T, heads, D], the same memory."""
    return torch.unflatten(x, -1, (-1, head_dim))


class KVView(NamedTuple):
    """What one layer needs to know about where the tokens of a batch live; see `kernels.paged_attention`."""

    k_cache: Tensor
    """[B, Hk, S, D], or int8 [B, Hk, S, D + 4]"""
    v_cache: Tensor
    """like k_cache"""
    slots: Tensor
    """[T] int64; where to write each token, negative for padding."""
    block_table: Tensor
    """[R, M] int32"""
    query_start: Tensor
    """[R+1] int32"""
    context_lens: Tensor
    """[R] int32"""


class QKNorm(Protocol):
    """Normalises queries and keys before they are rotated."""

    def __call__(self, q: Tensor, k: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """[T, Hq * D] and [T, Hk * D] to [T, Hq, D] and [T, Hk, D]."""


class NoNorm:
    """Queries and keys as they are."""

    def __call__(self, q: Tensor, k: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        return _heads(q, head_dim), _heads(k, head_dim)


@dataclass(frozen=True)
class HeadNorm:
    """Each head by itself, with weights of [D]."""

    q: RMSNorm
    k: RMSNorm

    def __call__(self, q: Tensor, k: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        return self.q(_heads(q, head_dim)), self.k(_heads(k, head_dim))


@dataclass(frozen=True)
class WholeNorm:
    """All heads of a token together, with weights of [Hq * D] and [Hk * D]."""

    q: RMSNorm
    k: RMSNorm

    def __call__(self, q: Tensor, k: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        return _heads(self.q(q), head_dim), _heads(self.k(k), head_dim)


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention with rotary positions, for any mix of prefill and decode."""

    qkv: Linear
    """[(Hq + 2 Hk) D, H]: rows of q, then k, then v."""
    out: Linear
    """[H, Hq D]"""
    norm: QKNorm
    sizes: list[int]
    """Rows of q, k and v."""
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], kv: KVView) -> Tensor:
        """[T, H] to [T, H]. Writes the tokens' keys and values into the cache, then attends to what is there.

        Args:
            angles: cosine and sine [T, R/2] float32 of the tokens' positions.
        """
        q, k, v = torch.split(self.qkv(x), self.sizes, dim=-1)
        q, k = self.norm(q, k, self.head_dim)
        q, k = kernels.rope(q, k, *angles)
        kernels.kv_write(k, _heads(v, self.head_dim), kv.k_cache, kv.v_cache, kv.slots)
        attended = kernels.paged_attention(
            q,
            kv.k_cache,
            kv.v_cache,
            kv.block_table,
            kv.query_start,
            kv.context_lens,
            self.scale,
            self.window,
            self.softcap,
        )
        return self.out(attended.flatten(1))
