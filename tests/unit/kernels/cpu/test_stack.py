"""All layers in one call are the calls of each layer one after another, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

_native = pytest.importorskip("tokenmill.kernels.cpu._native")
from tokenmill.kernels.cpu.attention_ops import PackedCache  # noqa: E402
from tokenmill.kernels.cpu.fused_ops import AttentionInput, MlpInput  # noqa: E402
from tokenmill.kernels.cpu.packed import Format, PackedWeight, pack  # noqa: E402
from tokenmill.kernels.cpu.row_ops import rms_norm_add  # noqa: E402
from tokenmill.kernels.cpu.stack_ops import Layer, Stack, WayBack  # noqa: E402

HIDDEN, INNER, Q_HEADS, KV_HEADS, WIDTH, BLOCK, EPS = 96, 160, 4, 2, 32, 16, 1e-5
LENGTHS = (40, 1, 17)


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _native.thread_count()
    _native.set_thread_count(request.param)
    yield
    _native.set_thread_count(before)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(format: Format, seed: int, post_norm: bool, window: int | None, softcap: float | None) -> Layer:
    def matrix(outputs: int, inputs: int, gated: bool = False) -> PackedWeight:
        return pack(normal(outputs, inputs, seed=seed + outputs).bfloat16() * 0.1, format, gated=gated)

    def norm(number: int) -> Tensor:
        return 1 + 0.1 * normal(HIDDEN, seed=seed + number)

    before, after = (None, norm) if post_norm else (norm, lambda number: None)
    attention = AttentionInput(
        before and before(1), EPS, matrix((Q_HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN), "none", None, None, Q_HEADS, WIDTH,
        WIDTH,
    )  # fmt: skip
    return Layer(
        attention,
        WIDTH**-0.5,
        window,
        softcap,
        WayBack(matrix(HIDDEN, Q_HEADS * WIDTH), after(2), EPS),
        MlpInput(before and before(3), EPS, matrix(2 * INNER, HIDDEN, gated=True), "silu"),
        WayBack(matrix(HIDDEN, INNER), after(4), EPS),
        rope=0 if window is None else 1,
    )


def one_by_one(layer: Layer, cache: PackedCache, x: Tensor, angles, slots, table, query_start, context_lens) -> Tensor:
    def back(way: WayBack, y: Tensor) -> Tensor:
        if way.norm is None:
            return way.projection.linear_add(y, x)
        return rms_norm_add(way.projection.linear(y), way.norm, way.eps, x)

    q = layer.attention(x, angles, cache, slots)
    options = (layer.scale, layer.window, layer.softcap)
    back(layer.from_attention, cache.attend(q, table, query_start, context_lens, *options).flatten(1))
    return back(layer.from_mlp, layer.mlp(x))


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_a_stack_is_its_layers(format: Format) -> None:
    layers = [make_layer(format, 10, False, None, None), make_layer(format, 20, True, 12, 5.0)]
    groups = [0, 1]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    angles = [(positions[:, None] * base ** (-torch.arange(WIDTH // 2) / WIDTH)).float() for base in (100.0, 1000.0)]
    angles = [(each.cos(), each.sin()) for each in angles]
    tables = [torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 0]], dtype=torch.int32) + 6 * group for group in groups]
    row_of = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    slots = [table[row_of, positions // BLOCK].long() * BLOCK + positions % BLOCK for table in tables]
    query_start = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    batch = (query_start, torch.tensor(LENGTHS, dtype=torch.int32))
    caches = [
        [PackedCache(*torch.zeros(2, 13, KV_HEADS, BLOCK, WIDTH, dtype=torch.bfloat16)) for _ in layers]
        for _ in range(2)
    ]
    x = normal(sum(LENGTHS), HIDDEN, seed=5).bfloat16()
    expected = x.clone()
    for layer, cache, group in zip(layers, caches[0], groups, strict=True):
        one_by_one(layer, cache, expected, angles[layer.rope], slots[group], tables[group], *batch)
    stack = Stack(layers, caches[1], groups)
    result = stack(x, angles, slots, tables, *batch)
    assert result is x
    assert torch.equal(x, expected)
    for one, other in zip(*caches, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    assert all(seconds > 0 for seconds in stack.seconds.values())
