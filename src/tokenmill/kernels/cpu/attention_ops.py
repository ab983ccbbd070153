"""Attention and cache writes over packed blocks.

A cache keeps its shape [B, Hk, S, D], one contiguous tensor for keys and one for values, but inside a block of one head
the elements stand in the order that the native kernels read: keys as [D / 2, S, 2], values as [S / 2, D, 2]. What is
written here must be read here; `pack_keys` and `pack_values` and their inverses convert from and to plain order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.cpu import _native

__all__ = ["PackedCache", "pack_keys", "pack_values", "serves", "unpack_keys", "unpack_values"]

_LANES = 16


def serves(dtype: torch.dtype, block_size: int, head_dim: int) -> bool:
    """Whether a cache of this type, tokens per block and elements per head can be packed."""
    return dtype == torch.bfloat16 and block_size % _LANES == 0 and head_dim % _LANES == 0


class PackedCache:
    """The cache of one layer, made once and used in every step.

    Args:
        keys: [B, Hk, S, D] bfloat16, contiguous; used, not copied.
        values: like keys.

    Raises:
        ValueError: when `serves` says no to them, or they are not contiguous.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        _, heads, size, width = keys.shape
        whole = keys.is_contiguous() and values.is_contiguous()
        if not whole or keys.shape != values.shape or not keys.dtype == values.dtype == torch.bfloat16:
            raise ValueError("Keys and values must be contiguous bfloat16 tensors of one shape.")
        self.keys = keys
        self.values = values
        self.native = _native.KVBlocks(keys.data_ptr(), values.data_ptr(), heads, size, width)

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """`kernels.kv_write`: mutates keys and values.

        Args:
            k: [T, Hk, D] bfloat16, the heads of a token and their elements side by side; tokens may be apart.
            v: like k.
            slots: [T] int64, negative to skip a token.
        """
        _native.kv_write(
            k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), slots.data_ptr(), k.shape[0], self.native
        )

    def attend(
        self,
        q: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """`kernels.paged_attention`: q [T, Hq, D] bfloat16, contiguous, to the same shape and type.

        Scores and sums are float32, the weights of the values bfloat16. A query's result has the same bits whatever
        else is in the batch, however its prompt was cut into chunks and however many threads there are.
        """
        out = torch.empty_like(q)
        _native.paged_attention(
            q.data_ptr(),
            out.data_ptr(),
            q.shape[0],
            q.shape[1],
            self.native,
            block_table.data_ptr(),
            block_table.stride(0),
            query_start.data_ptr(),
            context_lens.data_ptr(),
            context_lens.shape[0],
            scale,
            window or 0,
            softcap or 0.0,
        )
        return out


def pack_keys(keys: Tensor) -> Tensor:
    """Keys [..., S, D] in plain order to the order of a packed cache, same shape, new memory."""
    return torch.unflatten(keys, -1, (-1, 2)).transpose(-3, -2).reshape(keys.shape)


def pack_values(values: Tensor) -> Tensor:
    """Values [..., S, D] in plain order to the order of a packed cache, same shape, new memory."""
    return torch.unflatten(values, -2, (-1, 2)).transpose(-2, -1).reshape(values.shape)


def unpack_keys(keys: Tensor) -> Tensor:
    """The inverse of `pack_keys`."""
    *outer, size, width = keys.shape
    return keys.reshape(*outer, width // 2, size, 2).transpose(-3, -2).reshape(keys.shape)


def unpack_values(values: Tensor) -> Tensor:
    """The inverse of `pack_values`."""
    *outer, size, width = values.shape
    return values.reshape(*outer, size // 2, width, 2).transpose(-2, -1).reshape(values.shape)
