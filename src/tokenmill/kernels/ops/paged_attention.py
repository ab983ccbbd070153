"""paged_attention: causal attention of new tokens over a paged key-value cache, prefill and decode in one batch.

    paged_attention(q[T, Hq, D], k_cache[B, Hk, S, D], v_cache[B, Hk, S, D], block_table[R, M] int32,
                    query_start[R+1] int32, context_lens[R] int32, scale, window, softcap) -> [T, Hq, D] in q.dtype

Row r owns queries ``query_start[r]`` to ``query_start[r+1]``: the last tokens of a context of ``context_lens[r]``
tokens, whose keys and values are already in the cache: position p in block ``block_table[r, p // S]`` at offset
``p % S``.

* The query at position p sees positions 0..p, or p-window+1..p with a window.
* Query head h reads key-value head ``h // (Hq / Hk)``.
* scores = q.k * scale; with a softcap c (Gemma 2, arXiv 2408.00118) they become c * tanh(scores / c).
* Queries from ``query_start[R]`` on are padding and give zeros. A row without queries is allowed.
* Cache positions that no query of a row sees may hold anything, NaN too; table entries for them may be any number.

Nothing is mutated. Both caches have one dtype and are contiguous; q may have another dtype. Caches of int8 are
[B, Hk, S, D + 4] and hold keys and values as `kernels.whole_kv` says. If all are bfloat16, both matmuls take and give
bfloat16, as in the "eager" attention of other libraries, while scores are scaled, capped and summed up in float32;
otherwise everything is float32. In float32 a query's result is bit-equal whatever else is in the batch and however its
prompt was cut into chunks.

The reference computes the online softmax of FlashAttention (Dao et al., arXiv 2205.14135) over tiles: a few queries of
one row against a span of cached tokens that starts at a multiple of its length. A loop runs over spans; all tiles do a
step of it at once. Equal bits follow: a query meets the same spans in the same order each time, a span it may not see
changes nothing (it adds exact zeros to sums scaled by exactly 1), and in float32 the matmuls always have one shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokenmill.kernels import whole_kv

__all__ = ["cases", "reference"]

_SPAN = 128
"""Cached tokens per step, rounded to whole blocks."""
_EXACT_ROWS = 16
"""Rows (queries times the heads of a group) of each float32 matmul."""
_QUERY_TILES = (1, 8, 64)
"""Queries per tile otherwise: the smallest that holds a row's queries, else the largest."""
_STEP_BYTES = 4 << 20
"""Size of the keys gathered in one step; larger temporaries leave the CPU's caches."""
_NEVER = -1e30
"""Start of a running maximum. Finite, so that its difference to itself is 0 and not NaN."""


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """N tiles of L queries each, those with the most steps first. A tile with fewer queries repeats its last one."""

    query: Tensor
    """[N, L] index into q."""
    position: Tensor
    """[N, L] position of each query in its sequence."""
    table: Tensor
    """[N, M] blocks of the sequence."""
    first: Tensor
    """[N] the first span that a query of the tile sees."""
    steps: Tensor
    """[N] spans to visit, at least one; descending."""

    def split(self, size: int) -> Iterator[_Tiles]:
        """The same tiles in parts of at most `size`."""
        parts = (getattr(self, field.name).split(size) for field in dataclasses.fields(self))
        return (_Tiles(*part) for part in zip(*parts, strict=True))


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """See the module's docstring."""
    _, kv_heads, block_size, row = k_cache.shape
    span = block_size * max(1, _SPAN // block_size)
    dtype = torch.bfloat16 if q.dtype == k_cache.dtype == torch.bfloat16 else torch.float32
    exact_length = max(1, _EXACT_ROWS * kv_heads // q.shape[1])
    lengths = _QUERY_TILES if dtype == torch.bfloat16 else (exact_length,)
    tiles_at_once = max(1, _STEP_BYTES // (kv_heads * span * row * k_cache.element_size()))

    # Keys and then values of a step, over and over: memory fresh from the system costs more than copying into it.
    buffer = k_cache.new_empty(tiles_at_once, kv_heads, span, row)
    out = torch.zeros_like(q)
    counts, shorter = query_start.diff(), 0
    for length in lengths:
        longest = length if length != lengths[-1] else q.shape[0]
        rows = ((counts > shorter) & (counts <= longest)).nonzero().squeeze(1)
        shorter = length
        if len(rows) == 0:
            continue
        tiles = _tile(rows, length, block_table, query_start, context_lens, window, span)
        for part in tiles.split(tiles_at_once):
            attended = _attend(q[part.query].to(dtype), k_cache, v_cache, part, buffer, scale, window, softcap)
            out[part.query] = attended.to(q.dtype)
    return out


def _tile(
    rows: Tensor,
    length: int,
    block_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    window: int | None,
    span: int,
) -> _Tiles:
    """Cuts the queries of `rows`, each of which has some, into tiles of `length`."""
    start, context = query_start.long()[rows], context_lens.long()[rows]
    count = query_start.long()[rows + 1] - start
    needed = (count + length - 1) // length
    row = torch.arange(len(rows), device=rows.device).repeat_interleave(needed)
    rank = torch.arange(len(row), device=rows.device) - (needed.cumsum(0) - needed)[row]
    offset = rank.unsqueeze(1) * length + torch.arange(length, device=rows.device)
    offset = offset.minimum(count[row].unsqueeze(1) - 1)
    position = (context - count)[row].unsqueeze(1) + offset
    first = (position[:, 0] - window + 1).clamp(min=0) // span if window else torch.zeros_like(row)
    steps = position[:, -1] // span - first + 1
    order = steps.argsort(descending=True, stable=True)
    tiles = (start[row].unsqueeze(1) + offset, position, block_table.long()[rows][row], first, steps)
    return _Tiles(*(values[order] for values in tiles))


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tiles: _Tiles,
    buffer: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of the tiles' queries q[N, L, Hq, D], as [N, L, Hq, D] float32."""
    count, length, heads, width = q.shape
    _, kv_heads, span, _ = buffer.shape
    group = heads // kv_heads
    # One matmul per tile and key-value head; its rows are the queries times the heads of the group.
    q = torch.unflatten(q, 2, (kv_heads, group)).transpose(1, 2).reshape(count * kv_heads, length * group, width)
    maximum = q.new_full((count * kv_heads, length * group, 1), _NEVER, dtype=torch.float32)
    total = torch.zeros_like(maximum)
    result = torch.zeros_like(q, dtype=torch.float32)

    steps = tiles.steps.tolist()
    index = _block_index(tiles, k_cache, span)
    position = (tiles.position - tiles.first.unsqueeze(1) * span).repeat_interleave(group, dim=1).unsqueeze(2)
    clear = 0 if window is not None else int(position.amin() + 1) // span  # steps of which every query sees all
    active = count
    for step in range(steps[0]):
        while steps[active - 1] <= step:
            active -= 1
        n, blocks = active * kv_heads, index[:active, :, step].flatten()

        k = _elements(_gather(k_cache, blocks, buffer).view(n, span, -1), q.dtype)
        scores = torch.bmm(q[:n], k.transpose(1, 2)).float().mul_(scale)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if step >= clear:
            hidden = _hidden(torch.arange(step * span, (step + 1) * span, device=q.device), position[:active], window)
            scores.view(active, kv_heads, *scores.shape[1:]).masked_fill_(hidden.unsqueeze(1), float("-inf"))
        raised = torch.maximum(maximum[:n], scores.amax(dim=-1, keepdim=True))
        weights = scores.sub_(raised).exp_()
        kept = (maximum[:n] - raised).exp_()
        maximum[:n] = raised

        v = _elements(_gather(v_cache, blocks, buffer).view(n, span, -1), q.dtype)
        if step >= clear:  # what no query of the tile sees gets weight 0, but 0 * NaN is NaN
            tile, key = hidden.all(dim=1).nonzero(as_tuple=True)
            v.view(active, kv_heads, span, width)[tile, :, key] = 0
        total[:n].mul_(kept).add_(weights.sum(dim=-1, keepdim=True))
        result[:n].mul_(kept).add_(torch.bmm(weights.to(q.dtype), v))
    result /= total
    return result.view(count, kv_heads, length, group, width).transpose(1, 2).reshape(count, length, heads, width)


def _hidden(key: Tensor, query: Tensor, window: int | None) -> Tensor:
    """Whether the query at one position must not see the key at another (broadcast)."""
    later = key > query
    return later if window is None else later | (key <= query - window)


def _block_index(tiles: _Tiles, cache: Tensor, span: int) -> Tensor:
    """The blocks of each step, [N, Hk, steps, blocks of a span], in a cache seen as [B * Hk, S * D]."""
    blocks, heads, block_size, _ = cache.shape
    per_span = span // block_size
    column = tiles.first.unsqueeze(1) * per_span + torch.arange(int(tiles.steps[0]) * per_span, device=cache.device)
    # Columns past the end are of positions that nobody sees; so may be entries, which then may be any number.
    block = tiles.table.gather(1, column.clamp(max=tiles.table.shape[1] - 1)).clamp(0, blocks - 1)
    index = block.unsqueeze(1) * heads + torch.arange(heads, device=cache.device).unsqueeze(1)
    return torch.unflatten(index, 2, (-1, per_span))


def _gather(cache: Tensor, index: Tensor, buffer: Tensor) -> Tensor:
    """Copies the blocks into the front of the buffer and returns that part."""
    # As long rows: torch copies them several times faster than by a four-dimensional index.
    rows = cache.flatten(0, 1).flatten(1)
    return torch.index_select(rows, 0, index, out=buffer.view(-1, rows.shape[1])[: len(index)])


def _elements(cached: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cache holds, in the type to compute in."""
    return whole_kv.dequantize(cached) if cached.dtype == torch.int8 else cached.to(dtype)


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Named positional arguments. Unused cache places hold NaN."""
    plain: dict[str, Any] = {
        "heads": (4, 2),
        "width": 32,
        "block_size": 16,
        "dtype": torch.float32,
        "window": None,
        "softcap": None,
    }
    for name, lengths, changes in (
        ("one", [(1, 1)], {"heads": (1, 1), "width": 8}),
        ("decode", [(1, 5), (1, 300), (1, 128), (1, 129)], {}),
        ("prefill", [(5, 5), (200, 200), (33, 33)], {}),
        ("mixed", [(1, 77), (40, 140), (1, 1), (7, 260), (0, 0)], {}),
        ("odd_blocks", [(1, 50), (9, 31)], {"block_size": 7, "width": 24}),
        ("large_blocks", [(1, 250), (9, 31)], {"block_size": 200}),
        ("many_heads", [(1, 33), (3, 20)], {"heads": (21, 1), "width": 40}),
        ("no_groups", [(1, 33), (20, 20)], {"heads": (3, 3)}),
        ("window", [(1, 400), (50, 300), (30, 30)], {"window": 37}),
        ("window_of_one", [(1, 140), (3, 9)], {"window": 1}),
        ("softcap", [(1, 40), (20, 150)], {"softcap": 5.0, "window": 64}),
        ("sharp", [(1, 140), (20, 20)], {"sharpness": 100.0}),
        ("bfloat16", [(1, 300), (6, 150), (70, 200), (1, 1)], {"dtype": torch.bfloat16, "width": 64}),
        ("bfloat16_cache", [(1, 70), (6, 15)], {"cache_dtype": torch.bfloat16}),
        ("float16", [(1, 70), (6, 15)], {"dtype": torch.float16}),
        ("int8_cache", [(1, 300), (6, 150), (70, 200), (1, 1)], {"cache_dtype": torch.int8, "width": 48}),
        ("int8_bfloat16", [(1, 70), (6, 15)], {"cache_dtype": torch.int8, "dtype": torch.bfloat16, "window": 37}),
        ("no_queries", [(0, 0)], {}),
    ):
        yield name, _case(lengths, **{**plain, **changes})


def _case(
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int],
    width: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    cache_dtype: torch.dtype | None = None,
    sharpness: float = 1.0,
) -> tuple[Any, ...]:
    """Rows of (queries, context) over shuffled blocks, with three padding queries at the end."""
    random = torch.Generator().manual_seed(0)
    needed = [-(-context // block_size) for _, context in lengths]
    order = torch.randperm(sum(needed) + 2, generator=random).tolist()
    shape = (len(order), heads[1], block_size, width)
    caches = [torch.full(shape, float("nan")) for _ in range(2)]
    table = torch.zeros(len(lengths), max(*needed, 1) + 1, dtype=torch.int32)
    for row, (queries, context) in enumerate(lengths):
        for column in range(needed[row]):
            block, used = order.pop(), min(block_size, context - column * block_size)
            values = torch.randn(2, heads[1], used, width, generator=random)
            if window is not None and (column + 1) * block_size <= context - queries - window + 1:
                continue  # nobody sees this block: neither its table entry nor its content counts
            table[row, column] = block
            for cache, value in zip(caches, values, strict=True):
                cache[block, :, :used] = value
    starts = [0]
    for queries, _ in lengths:
        starts.append(starts[-1] + queries)
    if cache_dtype == torch.int8:
        caches = [whole_kv.quantize(cache) for cache in caches]
    else:
        caches = [cache.to(cache_dtype or dtype) for cache in caches]
    q = (torch.randn(starts[-1] + 3, heads[0], width, generator=random) * sharpness).to(dtype)
    return (
        q,
        *caches,
        table,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([context for _, context in lengths], dtype=torch.int32),
        width**-0.5,
        window,
        softcap,
    )
