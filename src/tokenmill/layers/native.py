"""The layers over the native CPU kernels: the same blocks, with several operations to a call.

A pre-norm layer is five calls: norm, qkv, rotation and cache write; attention; the way back; norm and gated product;
the way back. They stand beside the blocks of `models.decoder`, which say the same in single operations and run
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tokenmill.kernels.cpu.attention_ops import PackedCache, serves
from tokenmill.kernels.cpu.fused_ops import AttentionInput, MlpInput
from tokenmill.kernels.cpu.packed import Format, PackedWeight, pack
from tokenmill.kernels.cpu.row_ops import rms_norm, rms_norm_add
from tokenmill.layers.attention import KVView

__all__ = [
    "AttentionInput",
    "Format",
    "MlpInput",
    "NativeAttention",
    "NativeBlock",
    "NativeEmbedding",
    "NativeHead",
    "PackedWeight",
    "add",
    "add_normed",
    "pack",
    "serves",
]


WayBack = Callable[[PackedWeight, Tensor, Tensor], Tensor]
"""Adds a projection of its second argument to the residual stream, its third."""


def add(projection: PackedWeight, x: Tensor, residual: Tensor) -> Tensor:
    """``residual += projection(x)``."""
    return projection.linear_add(x, residual)


def add_normed(norm: Tensor, eps: float) -> WayBack:
    """``residual += norm(projection(x))``."""

    def add_projection(projection: PackedWeight, x: Tensor, residual: Tensor) -> Tensor:
        return rms_norm_add(projection.linear(x), norm, eps, residual)

    return add_projection


class NativeAttention:
    """Attention over the packed cache of one layer, from the residual stream to the input of the way back.

    Args:
        prepare: norm, qkv, rotation and cache write.
        scale, window, softcap: as `kernels.paged_attention` takes them.
    """

    def __init__(self, prepare: AttentionInput, scale: float, window: int | None, softcap: float | None) -> None:
        self._prepare = prepare
        self._options = (scale, window, softcap)
        self._cache: PackedCache | None = None

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], kv: KVView) -> Tensor:
        """[T, H] to [T, Hq * D]. Writes the tokens' keys and values into the cache."""
        cache = self._cache
        if cache is None or cache.keys is not kv.k_cache or cache.values is not kv.v_cache:
            cache = self._cache = PackedCache(kv.k_cache, kv.v_cache)  # once: a model keeps its cache
        q = self._prepare(x, angles, cache, kv.slots)
        attended = cache.attend(q, kv.block_table, kv.query_start, kv.context_lens, *self._options)
        return attended.flatten(1)


@dataclass(frozen=True)
class NativeBlock:
    """One layer of any kind: norms before the two halves are in the calls that begin them, norms after in the ways
    back.
    """

    attention: NativeAttention
    out: PackedWeight
    attention_back: WayBack
    mlp: MlpInput
    down: PackedWeight
    mlp_back: WayBack

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], kv: KVView) -> Tensor:
        """The residual stream [T, H], changed in place."""
        x = self.attention_back(self.out, self.attention(x, angles, kv), x)
        return self.mlp_back(self.down, self.mlp(x), x)


@dataclass(frozen=True)
class NativeEmbedding:
    """Rows of a table, scaled; the table may be the head's weight."""

    weight: PackedWeight
    """[V, H]"""
    scale: float
    """A number of bfloat16; see `layers.embedding.Embedding`."""

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] int64 to [T, H] bfloat16, new memory."""
        return self.weight.rows(token_ids, self.scale)


@dataclass(frozen=True)
class NativeHead:
    """The last norm and the projection onto the vocabulary."""

    norm: Tensor
    eps: float
    weight: PackedWeight
    softcap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[N, H], normed already, to [N, V] float32."""
        logits = self.weight.linear_f32(hidden)
        if self.softcap is None:
            return logits
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def normed(self, x: Tensor) -> Tensor:
        """[T, H] to the same."""
        return rms_norm(x, self.norm, self.eps)
