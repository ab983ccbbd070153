"""What a forward pass reads, and the memory it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.memory import zeros
from tokenmill.models.spec import KVLayout, kv_row_bytes

__all__ = ["Angles", "ForwardBatch", "KVCache"]

Angles = tuple[Tensor, Tensor]
"""Cosine and sine of the tokens' positions, both [T, R/2] float32."""


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens of R rows, one row per sequence, rows one after another; prefill and decode mix freely.

    Tokens after ``query_start[-1]`` are padding: their slots are -1 and their hidden states mean nothing.
    """

    token_ids: Tensor
    """[T] int64"""
    positions: Tensor
    """[T] int64, from 0 in each sequence."""
    slots: tuple[Tensor, ...]
    """Per KV group, [T] int64: ``block * block_size + offset`` to write the token's key and value to."""
    block_tables: tuple[Tensor, ...]
    """Per KV group, [R, M] int32: position p of row r is in block ``[r, p // block_size]``. Entries that no token of
    the batch can see may be any number."""
    query_start: Tensor
    """[R+1] int32: row r owns tokens ``query_start[r]`` to ``query_start[r + 1]``."""
    context_lens: Tensor
    """[R] int32: tokens of the sequence once this batch is computed."""


class KVCache:
    """Keys and values of all layers: ``layout.buffers`` pairs of tensors that a block id indexes.

    Starts as zeros, so that no place ever holds NaN by chance.

    Args:
        layout: how layers share buffers (`spec.kv_layout`).
        num_blocks: block ids, from 0.
        dtype: of keys and values, unless the layout says that they are quantized: then int8.
        device: where they live.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_blocks = num_blocks
        dtype = torch.int8 if layout.quantized else dtype
        row = kv_row_bytes(layout.head_dim, dtype.itemsize, layout.quantized) // dtype.itemsize
        shape = (num_blocks, layout.kv_heads, layout.block_size, row)

        def buffers() -> list[Tensor]:
            on_cpu = device.type == "cpu"
            return [
                zeros(shape, dtype) if on_cpu else torch.zeros(shape, dtype=dtype, device=device)
                for _ in range(layout.buffers)
            ]

        self.keys, self.values = buffers(), buffers()
        self._layers = {
            layer: (self.keys[buffer], self.values[buffer], group)
            for group, members in enumerate(layout.groups)
            for buffer, layer in enumerate(members.layers)
        }

    def layer(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Keys and values, both [num_blocks, kv_heads, block_size, head_dim], and the KV group of a layer.

        Quantized, rows are longer by the bytes of a scale; see `kernels.kv_write`.
        """
        return self._layers[index]

    @torch.inference_mode()
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks, in every buffer; each pair is (from, to). A pair sees what the pairs before it wrote."""
        while pairs:
            # As many at once as neither read nor write again what one of them writes.
            written: set[int] = set()
            count = 0
            for source, target in pairs:
                if source in written or target in written:
                    break
                written.add(target)
                count += 1
            sources, targets = torch.tensor(pairs[:count], device=self.keys[0].device).unbind(1)
            for cache in (*self.keys, *self.values):
                cache[targets] = cache[sources]
            pairs = pairs[count:]
