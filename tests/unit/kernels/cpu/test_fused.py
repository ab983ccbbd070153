"""The fused calls of a layer are the plain operations one after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tokenmill.kernels.ops import gelu_mul, rms_norm, rope, silu_mul

_native = pytest.importorskip("tokenmill.kernels.cpu._native")
from tokenmill.kernels.cpu.attention_ops import PackedCache, unpack_keys, unpack_values  # noqa: E402
from tokenmill.kernels.cpu.fused_ops import AttentionInput, MlpInput, QKNorm  # noqa: E402
from tokenmill.kernels.cpu.packed import PackedWeight, pack  # noqa: E402

HIDDEN, Q_HEADS, KV_HEADS, WIDTH, BLOCK, EPS = 96, 4, 2, 32, 16, 1e-5
Format = Literal["bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("bf16", "int8", "int4")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = _native.thread_count()
    _native.set_thread_count(2)
    yield
    _native.set_thread_count(before)


def normal(*shape: int, seed: int, mean: float = 0.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean


class Layer:
    """The way into attention, fused and as plain operations on the same packed product."""

    def __init__(
        self, format: Format = "bf16", qk_norm: QKNorm = "per_head", rotary: int = WIDTH, **changes: Any
    ) -> None:
        outputs = (Q_HEADS + 2 * KV_HEADS) * WIDTH
        bias = normal(outputs, seed=2) if changes.get("bias") else None
        self.qkv: PackedWeight = pack(normal(outputs, HIDDEN, seed=1).bfloat16() * 0.1, format, bias)
        self.norm = normal(HIDDEN, seed=3, mean=1.0) if changes.get("norm", True) else None
        sizes = {"none": (0, 0), "per_head": (WIDTH, WIDTH), "whole": (Q_HEADS * WIDTH, KV_HEADS * WIDTH)}[qk_norm]
        self.q_norm, self.k_norm = (normal(size, seed=4 + size, mean=1.0) for size in sizes)
        self.qk_norm, self.rotary = qk_norm, rotary
        self.fused = AttentionInput(self.norm, EPS, self.qkv, qk_norm, self.q_norm, self.k_norm, Q_HEADS, WIDTH, rotary)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None] * 100.0 ** (-torch.arange(0, self.rotary, 2) / max(self.rotary, 1))
        return angles.cos(), angles.sin()

    def plain(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [T, heads, D] in float32 and v in bfloat16."""
        if self.norm is not None:
            x = rms_norm.reference(x, self.norm, EPS)
        sizes = [Q_HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH]
        q, k, v = self.qkv.linear(x).split(sizes, dim=-1)
        q, k = q.float(), k.float()
        if self.qk_norm == "per_head":
            q, k = (part.unflatten(-1, (-1, WIDTH)) for part in (q, k))
        if self.qk_norm != "none":
            q, k = rms_norm.reference(q, self.q_norm, EPS), rms_norm.reference(k, self.k_norm, EPS)
        q, k = (part.reshape(len(x), -1, WIDTH) for part in (q, k))
        return *rope.reference(q, k, *self.angles(positions)), v.unflatten(-1, (-1, WIDTH))


def empty_cache(fill: float = 0.0) -> PackedCache:
    return PackedCache(*(torch.full((8, KV_HEADS, BLOCK, WIDTH), fill, dtype=torch.bfloat16) for _ in range(2)))


def written(cache: PackedCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [T, Hk, D] at these slots."""
    at = (slots // BLOCK, slice(None), slots % BLOCK)
    return unpack_keys(cache.keys)[at], unpack_values(cache.values)[at]


CASES: dict[str, dict[str, Any]] = {
    "head_norms": {},
    "no_norms_of_heads": {"qk_norm": "none", "bias": True},
    "whole_norms": {"qk_norm": "whole"},
    "partly_rotated": {"rotary": 20},
    "not_rotated": {"rotary": 0},
    "no_input_norm": {"norm": False},
    "int8": {"format": "int8"},
    "int4": {"format": "int4", "bias": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 21])
def test_attention_input_is_what_the_operations_give(case: str, tokens: int) -> None:
    layer = Layer(**CASES[case])
    x, positions = normal(tokens, HIDDEN, seed=9).bfloat16(), torch.arange(tokens) * 7
    slots = torch.randperm(8 * BLOCK, generator=torch.Generator().manual_seed(0))[:tokens]
    cache = empty_cache()
    q = layer.fused(x, layer.angles(positions), cache, slots)
    keys, values = written(cache, slots)
    expected_q, expected_k, expected_v = layer.plain(x, positions)
    # A row of the norm may be rounded the other way, and then so may every sum over it.
    tolerance = {"rtol": 2**-7, "atol": 0.02}
    torch.testing.assert_close(q.float(), expected_q, **tolerance)
    torch.testing.assert_close(keys.float(), expected_k, **tolerance)
    torch.testing.assert_close(values, expected_v, **tolerance)


def test_attention_input_leaves_the_rest_of_the_cache_alone() -> None:
    layer, cache = Layer(), empty_cache(fill=float("nan"))
    slots = torch.tensor([5, -1, 40])
    q = layer.fused(normal(3, HIDDEN, seed=1).bfloat16(), layer.angles(torch.arange(3)), cache, slots)
    assert q.isfinite().all()  # a skipped token has queries nevertheless
    for stored in (unpack_keys(cache.keys), unpack_values(cache.values)):
        finite = stored.isfinite().all(dim=-1).all(dim=1).flatten().nonzero().flatten()
        assert finite.tolist() == [5, 40]
        assert stored.isfinite().any(dim=-1).any(dim=1).sum() == 2


@pytest.mark.parametrize("format", FORMATS)
def test_bits_of_a_token_do_not_depend_on_the_batch_or_threads(format: Format) -> None:
    layer, x = Layer(format), normal(40, HIDDEN, seed=5).bfloat16()
    positions, slots = torch.arange(40), torch.arange(40)
    together = empty_cache()
    q = layer.fused(x, layer.angles(positions), together, slots)
    _native.set_thread_count(1)
    for first, end in ((0, 1), (13, 20), (20, 40), (39, 40)):
        part, cache = slice(first, end), empty_cache()
        alone = layer.fused(x[part], layer.angles(positions[part]), cache, slots[part])
        assert torch.equal(alone, q[part])
        for one, all_ in zip(written(cache, slots[part]), written(together, slots[part]), strict=True):
            assert torch.equal(one, all_)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("with_norm", [True, False])
def test_mlp_input_is_norm_product_and_gate(format: Format, activation: Any, with_norm: bool) -> None:
    weight = normal(2 * 70, HIDDEN, seed=1).bfloat16() * 0.1
    gated, plain = pack(weight, format, gated=True), pack(weight, format)
    norm = normal(HIDDEN, seed=2, mean=1.0) if with_norm else None
    x = normal(21, HIDDEN, seed=3).bfloat16()
    fused = MlpInput(norm, EPS, gated, activation)
    result = fused(x)
    normed = x if norm is None else rms_norm.reference(x, norm, EPS)
    gate = silu_mul.reference if activation == "silu" else gelu_mul.reference
    torch.testing.assert_close(result.float(), gate(plain.linear_f32(normed)), rtol=2**-7, atol=0.02)
    _native.set_thread_count(1)
    for row in (0, 15, 16, 20):
        assert torch.equal(fused(x[row : row + 1]), result[row : row + 1])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_instruction_set_passes_these_tests(isa: str, run_tests_with_isa: Any) -> None:
    run_tests_with_isa(isa, __file__)
