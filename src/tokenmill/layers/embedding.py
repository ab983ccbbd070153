"""Token ids to vectors, and vectors to logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tokenmill.layers.linear import Linear
from tokenmill.quant.weight import Quantized, rows

__all__ = ["Embedding", "LogitsHead", "QuantizedEmbedding"]


@dataclass(frozen=True)
class Embedding:
    """Rows of a table, scaled."""

    weight: Tensor
    """[V, H]"""
    scale: Tensor
    """Scalar of the weight's type: gemma was trained with its scale rounded to that type."""

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] int64 to [T, H], new memory."""
        return F.embedding(token_ids, self.weight).mul_(self.scale)


@dataclass(frozen=True)
class QuantizedEmbedding:
    """The same from a quantized table."""

    weight: Quantized
    """[V, H]"""
    scale: Tensor
    """Scalar of the type that rows get."""

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] int64 to [T, H] of the scale's type, new memory."""
        return rows(self.weight, token_ids, self.scale.dtype).mul_(self.scale)


@dataclass(frozen=True)
class LogitsHead:
    """The projection onto the vocabulary."""

    linear: Linear
    """[V, H]; may share its weight with the embedding."""
    softcap: float | None
    """Logits s become ``softcap * tanh(s / softcap)`` (arXiv 2408.00118); None leaves them."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """[N, H] to [N, V] float32."""
        logits = self.linear(hidden).float()
        if self.softcap is None:
            return logits
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)
