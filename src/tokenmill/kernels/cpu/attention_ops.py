"""Attention and cache writes over packed blocks.

A cache keeps its shape [B, Hk, S, D], one contiguous tensor for keys and one for values, but inside a block of one head
the elements stand in the order that the native kernels read: keys as [D / 2, S, 2], values as [S / 2, D, 2]. Behind the
elements of an int8 block, [B, Hk, S, D + 4], stand its scales (`kernels.whole_kv`), [S] float32. What is written here
must be read here; `pack_keys` and `pack_values` and their inverses convert from and to plain order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenmill.kernels.cpu import _native
from tokenmill.kernels.whole_kv import SCALE_BYTES

__all__ = ["PackedCache", "pack_keys", "pack_values", "serves", "unpack_keys", "unpack_values"]

_LANES = 16
_FORMATS = {torch.bfloat16: _native.KVFormat.bf16, torch.int8: _native.KVFormat.int8}


def serves(dtype: torch.dtype, block_size: int, head_dim: int) -> bool:
    """Whether a cache for queries of this type, tokens per block and elements per head can be packed."""
    return dtype == torch.bfloat16 and block_size % _LANES == 0 and head_dim % _LANES == 0


class PackedCache:
    """The cache of one layer, made once and used in every step.

    Args:
        keys: [B, Hk, S, D] bfloat16 or [B, Hk, S, D + 4] int8, contiguous; used, not copied.
        values: like keys.

    Raises:
        ValueError: when `serves` says no to them, or they are not contiguous.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        _, heads, size, row = keys.shape
        together = keys.is_contiguous() and values.is_contiguous()
        alike = keys.shape == values.shape and keys.dtype == values.dtype
        if not together or not alike or keys.dtype not in _FORMATS:
            raise ValueError("Keys and values must be contiguous bfloat16 or int8 tensors of one shape.")
        width = row - SCALE_BYTES if keys.dtype == torch.int8 else row
        self.keys = keys
        self.values = values
        self.native = _native.KVBlocks(_FORMATS[keys.dtype], keys.data_ptr(), values.data_ptr(), heads, size, width)

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

        Scores and sums are float32, the weights of the values bfloat16; over int8 queries and weights become int16 and
        sums are exact, but for AMX, which multiplies int8 as bfloat16 too. A query's result has the same bits whatever
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
    """Keys in plain order, [..., S, D] or int8 [..., S, D + 4], to that of a packed cache, same shape, new memory."""
    return _pack(keys, lambda x: torch.unflatten(x, -1, (-1, 2)).transpose(-3, -2))


def pack_values(values: Tensor) -> Tensor:
    """Values in plain order, like keys, to that of a packed cache, same shape, new memory."""
    return _pack(values, lambda x: torch.unflatten(x, -2, (-1, 2)).transpose(-2, -1))


def unpack_keys(keys: Tensor) -> Tensor:
    """The inverse of `pack_keys`."""
    return _unpack(keys, lambda x, size, width: torch.unflatten(x, -1, (width // 2, size, 2)).transpose(-3, -2))


def unpack_values(values: Tensor) -> Tensor:
    """The inverse of `pack_values`."""
    return _unpack(values, lambda x, size, width: torch.unflatten(x, -1, (size // 2, width, 2)).transpose(-2, -1))


def _pack(plain: Tensor, order: Callable[[Tensor], Tensor]) -> Tensor:
    if plain.dtype != torch.int8:
        return order(plain).reshape(plain.shape)
    elements, scales = plain[..., :-SCALE_BYTES], plain[..., -SCALE_BYTES:]
    return torch.cat((order(elements).flatten(-3), scales.flatten(-2)), dim=-1).reshape(plain.shape)


def _unpack(packed: Tensor, order: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    *_, size, row = packed.shape
    whole, block = packed.dtype == torch.int8, packed.flatten(-2)
    width = row - SCALE_BYTES if whole else row
    elements = order(block[..., : size * width], size, width).reshape(*packed.shape[:-1], width)
    if not whole:
        return elements
    return torch.cat((elements, torch.unflatten(block[..., size * width :], -1, (size, SCALE_BYTES))), dim=-1)
