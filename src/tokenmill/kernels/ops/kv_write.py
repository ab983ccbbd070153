"""kv_write: put the keys and values of new tokens into their places in the paged cache.

    kv_write(k[T, Hk, D], v[T, Hk, D], k_cache[B, Hk, S, D], v_cache[B, Hk, S, D], slots[T] int64) -> None

Mutates both caches: token t goes to offset ``slots[t] % S`` of block ``slots[t] // S``. A negative slot skips its
token. Slots that are not negative are distinct. Values are cast to the dtype of the caches; caches of int8 are
[B, Hk, S, D + 4] and hold them as `kernels.whole_kv` says. The paged layout is that of PagedAttention (Kwon et al.,
arXiv 2309.06180) with all tokens of a head side by side within a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokenmill.kernels import whole_kv

__all__ = ["cases", "reference"]


def reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """See the module's docstring."""
    kept = slots >= 0
    block_size = k_cache.shape[2]
    place = slots[kept]
    block, offset = place // block_size, place % block_size
    for cache, new in ((k_cache, k[kept]), (v_cache, v[kept])):
        cache[block, :, offset] = whole_kv.quantize(new) if cache.dtype == torch.int8 else new.to(cache.dtype)


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Named positional arguments."""
    random = torch.Generator().manual_seed(0)
    for name, tokens, skipped, blocks, heads, block_size, width, dtype in (
        ("one", 1, 0, 1, 1, 1, 1, torch.float32),
        ("scattered", 11, 0, 7, 2, 16, 32, torch.float32),
        ("odd_blocks", 13, 4, 5, 3, 7, 24, torch.float32),
        ("all_skipped", 3, 3, 2, 1, 4, 8, torch.float32),
        ("no_tokens", 0, 0, 2, 1, 4, 8, torch.float32),
        ("bfloat16", 9, 2, 4, 2, 16, 64, torch.bfloat16),
        ("int8", 13, 1, 4, 2, 16, 48, torch.int8),
    ):
        whole = dtype == torch.int8
        k, v = (torch.randn(tokens, heads, width, generator=random) for _ in range(2))
        caches = [torch.randn(blocks, heads, block_size, width, generator=random) for _ in range(2)]
        caches = [whole_kv.quantize(cache) if whole else cache.to(dtype) for cache in caches]
        k, v = (x if whole else x.to(dtype) for x in (k, v))
        slots = torch.randperm(blocks * block_size, generator=random)[:tokens]
        slots[:skipped] = -1
        yield name, (k, v, *caches, slots)
