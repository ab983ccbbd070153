"""What a model is made of on the native CPU kernels: layers that run in one call, embedding and head.

They stand beside the blocks of `models.decoder`, which say the same in single operations and run everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenmill.kernels.cpu.attention_ops import PackedCache, serves
from tokenmill.kernels.cpu.fused_ops import AttentionInput, MlpInput
from tokenmill.kernels.cpu.packed import Format, PackedWeight, pack
from tokenmill.kernels.cpu.row_ops import rms_norm
from tokenmill.kernels.cpu.stack_ops import Layer, Stack, WayBack

__all__ = [
    "AttentionInput",
    "Format",
    "Layer",
    "MlpInput",
    "NativeEmbedding",
    "NativeHead",
    "PackedCache",
    "PackedWeight",
    "Stack",
    "WayBack",
    "pack",
    "serves",
]


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
