"""Native attention over packed blocks: right, and the same bits however the work is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import whole_kv
from tokenmill.kernels.ops import kv_write as kv_write_op
from tokenmill.kernels.ops import paged_attention as attention_op

_native = pytest.importorskip("tokenmill.kernels.cpu._native")
from tokenmill.kernels.cpu import attention_ops as native  # noqa: E402


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = _native.thread_count()
    _native.set_thread_count(2)
    yield
    _native.set_thread_count(before)


KINDS = (torch.bfloat16, torch.int8)
"""Types of a cache."""
TOLERANCE = {torch.bfloat16: 4e-3, torch.int8: 8e-3}
"""AMX rounds even the largest weight of an int8 value to bfloat16: the weight is multiplied by the value's scale."""


def stored(x: Tensor, kind: torch.dtype) -> Tensor:
    """Keys or values [..., D] as a cache in plain order holds them."""
    return whole_kv.quantize(x) if kind == torch.int8 else x.to(kind)


def empty(shape: tuple[int, ...], kind: torch.dtype, fill: float = 0.0) -> native.PackedCache:
    """A cache [B, Hk, S, D] that holds `fill` everywhere."""
    filled = torch.full(shape, fill)
    return native.PackedCache(native.pack_keys(stored(filled, kind)), native.pack_values(stored(filled, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_packing_has_an_inverse(kind: torch.dtype) -> None:
    cache = stored(torch.randn(3, 2, 32, 48), kind)
    assert torch.equal(native.unpack_keys(native.pack_keys(cache)), cache)
    assert torch.equal(native.unpack_values(native.pack_values(cache)), cache)


def test_packed_int8_is_elements_and_then_scales() -> None:
    cache = stored(torch.randn(16, 48), torch.int8)
    packed = native.pack_keys(cache).flatten()
    assert torch.equal(packed[: 16 * 48].view(24, 16, 2), cache[:, :48].view(16, 24, 2).transpose(0, 1))
    assert torch.equal(packed[16 * 48 :].view(16, 4), cache[:, 48:])
    assert torch.equal(native.pack_values(cache).flatten()[16 * 48 :].view(16, 4), cache[:, 48:])


@pytest.mark.parametrize("arguments", [pytest.param(a, id=name) for name, a in kv_write_op.cases()])
def test_written_tokens_stand_where_the_reference_puts_them(arguments: tuple[Tensor, ...]) -> None:
    k, v, k_cache, v_cache, slots = arguments
    if not native.serves(torch.bfloat16, k_cache.shape[2], k.shape[2]):
        pytest.skip("not a shape that packs")
    k, v = k.bfloat16(), v.bfloat16()
    if k_cache.dtype != torch.int8:
        k_cache, v_cache = k_cache.bfloat16(), v_cache.bfloat16()
    cache = native.PackedCache(native.pack_keys(k_cache), native.pack_values(v_cache))
    cache.write(k, v, slots)
    kv_write_op.reference(k, v, k_cache, v_cache, slots)
    assert torch.equal(native.unpack_keys(cache.keys), k_cache)
    assert torch.equal(native.unpack_values(cache.values), v_cache)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_keys_and_values_may_be_apart(kind: torch.dtype) -> None:
    joined = torch.randn(5, 7, 2, 32).bfloat16()
    cache = empty((1, 2, 16, 32), kind)
    slots = torch.tensor([3, -1, 0, 15, 8])
    cache.write(joined[:, 2], joined[:, 6], slots)
    keys, values = native.unpack_keys(cache.keys), native.unpack_values(cache.values)
    kept = slots >= 0
    assert torch.equal(keys[0, :, slots[kept]].transpose(0, 1), stored(joined[kept, 2], kind))
    assert torch.equal(values[0, :, slots[kept]].transpose(0, 1), stored(joined[kept, 6], kind))


EXTREMES = {
    "zeros": [0.0, 0.0],
    "equal": [3.0, 3.0],
    "one_of_many": [0.0, -7.0],
    "largest": [3.3e38, -3.3e38],
    "just_counts": [2e-30, 1e-30],
    "too_small": [9e-31, 1e-38],
    "halves": [127.0, 0.5],
    "nan": [1.0, float("nan")],
    "infinity": [1.0, float("-inf")],
}


@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("place", [0, 3, 15])
def test_extreme_tokens_are_quantized_as_the_reference_does(values: list[float], place: int) -> None:
    most, other = values
    k = torch.full((1, 1, 48), other).bfloat16()
    k[..., 5] = most
    cache = empty((1, 1, 16, 48), torch.int8)
    cache.write(k, -k, torch.tensor([place]))
    for mine, x in ((native.unpack_keys(cache.keys), k), (native.unpack_values(cache.values), -k)):
        expected = whole_kv.quantize(torch.zeros(16, 48))
        expected[place] = whole_kv.quantize(x[0, 0])
        assert torch.equal(mine[0, 0, :, :48], expected[:, :48])
        scales, mine_scales = (rows[:, 48:].contiguous().view(torch.float32) for rows in (expected, mine[0, 0]))
        torch.testing.assert_close(mine_scales, scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("arguments", [pytest.param(a, id=name) for name, a in attention_op.cases()])
def test_the_reference_agrees(arguments: tuple[Any, ...]) -> None:
    q, k_cache, v_cache, *rest = arguments
    if not native.serves(torch.bfloat16, k_cache.shape[2], q.shape[2]):
        pytest.skip("not a shape that packs")
    q, plain = q.bfloat16(), (k_cache, v_cache)
    if k_cache.dtype != torch.int8:
        k_cache, v_cache = k_cache.bfloat16(), v_cache.bfloat16()
        plain = (k_cache.float(), v_cache.float())
    expected = attention_op.reference(q.float(), *plain, *rest)
    result = native.PackedCache(native.pack_keys(k_cache), native.pack_values(v_cache)).attend(q, *rest)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=1e-2, atol=1e-2)


@dataclass(frozen=True)
class Sequences:
    """Sequences whose keys and values lie in a packed cache, and a query for each of their tokens."""

    q: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    cache: native.PackedCache
    table: Tensor
    window: int | None = None
    softcap: float | None = None

    def attend(self, pieces: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """One call for pieces (sequence, first query, end): the result of each, [end - first, Hq, D]."""
        counts = [end - first for _, first, end in pieces]
        starts = [0, *itertools.accumulate(counts)]
        rows = torch.tensor([sequence for sequence, _, _ in pieces])
        out = self.cache.attend(
            torch.cat([self.q[sequence][first:end] for sequence, first, end in pieces]),
            self.table[rows].contiguous(),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([end for _, _, end in pieces], dtype=torch.int32),
            self.q[0].shape[-1] ** -0.5,
            self.window,
            self.softcap,
        )
        return list(out.split(counts))

    def exact(self, sequence: int, first: int = 0) -> Tensor:
        """The queries of a sequence from `first` on, in float64."""
        q, k, v = (x.double() for x in (self.q[sequence][first:], self.keys[sequence], self.values[sequence]))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        key, query = torch.arange(len(k)), torch.arange(first, first + len(q)).unsqueeze(1)
        hidden = key > query
        if self.window is not None:
            hidden |= key <= query - self.window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, v)


def sequences(
    lengths: Sequence[int],
    heads: tuple[int, int] = (4, 2),
    width: int = 64,
    size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    fill: float = float("nan"),
    kind: torch.dtype = torch.bfloat16,
) -> Sequences:
    """Random sequences in shuffled blocks of a cache that otherwise holds `fill`."""
    random = torch.Generator().manual_seed(1)
    needed = [-(-length // size) for length in lengths]
    order = torch.randperm(sum(needed) + 1, generator=random).tolist()
    shape = (len(order), heads[1], size, width)
    cache = empty(shape, kind, fill)
    table = torch.full((len(lengths), max(needed)), 1 << 30, dtype=torch.int32)
    q, keys, values = [], [], []
    for row, length in enumerate(lengths):
        q.append(torch.randn(length, heads[0], width, generator=random).bfloat16())
        keys.append(torch.randn(length, heads[1], width, generator=random).bfloat16())
        values.append(torch.randn(length, heads[1], width, generator=random).bfloat16())
        blocks = torch.tensor([order.pop() for _ in range(needed[row])])
        table[row, : len(blocks)] = blocks
        position = torch.arange(length)
        cache.write(keys[row], values[row], blocks[position // size] * size + position % size)
        if kind == torch.int8:  # what they are from here on
            keys[row], values[row] = (whole_kv.dequantize(whole_kv.quantize(x)) for x in (keys[row], values[row]))
    return Sequences(q, keys, values, cache, table, window, softcap)


SHAPES: dict[str, dict[str, Any]] = {
    "pairs": {},
    "single_heads": {"heads": (3, 3), "width": 16},
    "one_kv_head": {"heads": (21, 1), "width": 80},
    "eight_to_one": {"heads": (16, 2), "width": 128, "size": 32},
    "wide": {"heads": (2, 1), "width": 256, "size": 48},
    "window": {"window": 37},
    "window_over_spans": {"window": 600},
    "tiny_window": {"window": 2, "heads": (4, 4)},
    "softcap": {"softcap": 3.0},
}
LENGTHS = (1, 1100, 17, 530)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_queries_get_the_exact_average_but_for_rounding(shape: str, kind: torch.dtype) -> None:
    case = sequences(LENGTHS, **SHAPES[shape], kind=kind)
    results = case.attend([(row, 0, length) for row, length in enumerate(LENGTHS)])
    for row, result in enumerate(results):
        torch.testing.assert_close(result.double(), case.exact(row), rtol=1e-2, atol=TOLERANCE[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_chunks_batch_or_threads(shape: str, kind: torch.dtype) -> None:
    case = sequences(LENGTHS, **SHAPES[shape], kind=kind)
    _native.set_thread_count(1)
    alone = [case.attend([(row, 0, length)])[0] for row, length in enumerate(LENGTHS)]
    for count in (1, 2, 5):
        _native.set_thread_count(count)
        together = case.attend([(row, 0, length) for row, length in enumerate(LENGTHS)])
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        for cuts in ([0, 7, 500, 520, 1099, 1100], [0, 513, 1100]):
            chunks = [
                case.attend([(3, 100, 530), (1, first, end), (0, 0, 1)])[1] for first, end in itertools.pairwise(cuts)
            ]
            assert torch.equal(alone[1], torch.cat(chunks))
        for last in (1, 2, 3, 15, 16, 17, 511, 512, 513, 514, 1023, 1024, 1025, 1100):
            decoded = case.attend([(1, last - 1, last), (2, 16, 17)])
            assert torch.equal(alone[1][last - 1 : last], decoded[0])
            assert torch.equal(alone[2][16:17], decoded[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads_", [1, 3, 16])
def test_a_long_context_is_the_same_over_any_number_of_threads(threads_: int, kind: torch.dtype) -> None:
    case = sequences([5000], heads=(2, 1), kind=kind)
    _native.set_thread_count(1)
    expected = case.attend([(0, 4999, 5000)])[0]
    _native.set_thread_count(threads_)
    assert torch.equal(expected, case.attend([(0, 4999, 5000)])[0])
    torch.testing.assert_close(expected[0].double(), case.exact(0, first=4999)[0], rtol=1e-2, atol=TOLERANCE[kind])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -3e38])
@pytest.mark.parametrize("window", [None, 1, 6, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_query_does_not_see_never_touches_it(garbage: float, window: int | None, kind: torch.dtype) -> None:
    clean = sequences([90], window=window, fill=0.0, kind=kind)
    expected = clean.attend([(0, 0, 90)])[0]
    for position in (0, 1, 30, 31, 88, 89):
        case = sequences([90], window=window, fill=garbage, kind=kind)
        spoiled = torch.full((1, 2, 64), garbage).bfloat16()
        slot = case.table[0, position // 16].long() * 16 + position % 16
        case.cache.write(spoiled, spoiled, slot.view(1))
        result = case.attend([(0, 0, 90)])[0]
        sees = torch.arange(90) >= position
        if window is not None:
            sees &= torch.arange(90) < position + window
        assert torch.equal(result[~sees], expected[~sees])


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_travel(kind: torch.dtype) -> None:
    case = sequences([40], fill=0.0, kind=kind)
    spoiled = torch.full((1, 2, 64), float("nan")).bfloat16()
    case.cache.write(case.keys[0][20:21], spoiled, case.table[0, 1:2].long() * 16 + 4)
    result = case.attend([(0, 0, 40)])[0]
    assert result[:20].isfinite().all()
    assert result[20:].isnan().all()
    case.q[0][5] = float("inf")
    assert case.attend([(0, 0, 40)])[0][5].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_keys_travel(kind: torch.dtype) -> None:
    case = sequences([40], fill=0.0, kind=kind)
    spoiled = torch.full((1, 2, 64), float("nan")).bfloat16()
    case.cache.write(spoiled, torch.ones_like(spoiled), case.table[0, 1:2].long() * 16)
    result = case.attend([(0, 0, 40)])[0]
    assert result[:16].isfinite().all()
    assert result[16:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_scores_choose_one_value(kind: torch.dtype) -> None:
    case = sequences([600], fill=0.0, kind=kind)
    case = replace(case, q=[case.q[0] * 1000])
    result = case.attend([(0, 0, 600)])[0]
    # Scores of thousands are met to a part in 32767 of the query's largest element over int8.
    tolerance = 1e-2 if kind == torch.bfloat16 else 1e-1
    torch.testing.assert_close(result.double(), case.exact(0), rtol=1e-2, atol=tolerance)


@pytest.mark.parametrize("factor", [0.0, 1e-33, 1e-20, 1e20])
def test_int8_keeps_the_shape_of_values_of_any_size(factor: float) -> None:
    case = sequences([200], kind=torch.int8)
    slots = case.table[0].long().repeat_interleave(16)[:200] * 16 + torch.arange(200) % 16
    scaled = (case.values[0] * factor).bfloat16()
    case.cache.write(case.keys[0].bfloat16(), scaled, slots)
    values = whole_kv.dequantize(whole_kv.quantize(scaled))
    keys = whole_kv.dequantize(whole_kv.quantize(case.keys[0].bfloat16()))
    result = case.attend([(0, 0, 200)])[0]
    exact = replace(case, keys=[keys], values=[values]).exact(0)
    torch.testing.assert_close(result.double(), exact, rtol=1e-2, atol=TOLERANCE[torch.int8] * factor)


def test_tokens_that_no_row_owns_give_zeros() -> None:
    case = sequences([20])
    q = torch.cat([case.q[0], case.q[0][:3]])
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 20], [20]))
    out = case.cache.attend(q, case.table, starts, lengths, 0.125, None, None)
    assert out[20:].eq(0).all()
    assert out[:20].isfinite().all()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_instruction_set_passes_these_tests(isa: str, run_tests_with_isa: Any) -> None:
    run_tests_with_isa(isa, __file__)
