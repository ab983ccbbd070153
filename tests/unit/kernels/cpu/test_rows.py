"""Native norms, gates and rotations against the references of their operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.kernels.ops import gelu_mul, rms_norm, rope, silu_mul

_native = pytest.importorskip("tokenmill.kernels.cpu._native")
from tokenmill.kernels.cpu import row_ops as native  # noqa: E402

ONE_ROUNDING = {"rtol": 2**-8, "atol": 1e-30}
"""Both round the same number to bfloat16, up to an error of float32 that may tip it over."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = _native.thread_count()
    _native.set_thread_count(2)
    yield
    _native.set_thread_count(before)


@pytest.mark.parametrize("arguments", [pytest.param(a, id=name) for name, a in rms_norm.cases()])
def test_rms_norm(arguments: tuple[Any, ...]) -> None:
    x, weight, eps = arguments
    x, weight = x.bfloat16(), weight.float()
    torch.testing.assert_close(native.rms_norm(x, weight, eps), rms_norm.reference(x, weight, eps), **ONE_ROUNDING)


@pytest.mark.parametrize("arguments", [pytest.param(a, id=name) for name, a in rms_norm.cases()])
def test_rms_norm_adds_to_the_residual(arguments: tuple[Any, ...]) -> None:
    x, weight, eps = arguments
    x, weight = x.bfloat16(), weight.float()
    residual = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = (residual.float() + rms_norm.reference(x.float(), weight, eps)).bfloat16()
    result = native.rms_norm_add(x, weight, eps, residual)
    assert result is residual
    # A sum that lies between two numbers of the type may go to either: one unit in the last place.
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "activation", "operation"),
    [(native.silu_mul, F.silu, silu_mul), (native.gelu_mul, partial(F.gelu, approximate="tanh"), gelu_mul)],
    ids=["silu", "gelu"],
)
def test_gates(function: Callable[[Tensor], Tensor], activation: Callable[[Tensor], Tensor], operation: Any) -> None:
    for _, (x,) in operation.cases():
        x = x.bfloat16()
        gate, up = x.double().chunk(2, dim=-1)
        # Half a unit in the last place of bfloat16, and some of float32.
        torch.testing.assert_close(function(x).double(), activation(gate) * up, rtol=2**-8 * 1.001, atol=1e-13)


@pytest.mark.parametrize("arguments", [pytest.param(a, id=name) for name, a in rope.cases()])
def test_rope_has_the_bits_of_the_reference(arguments: tuple[Tensor, ...]) -> None:
    q, k, cos, sin = arguments
    results = native.rope(q.bfloat16(), k.bfloat16(), cos, sin)
    for result, expected in zip(results, rope.reference(q.bfloat16(), k.bfloat16(), cos, sin), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: native.rms_norm(x, torch.linspace(-1, 2, x.shape[1]), 1e-5),
        native.silu_mul,
        native.gelu_mul,
        lambda x: native.rope(*[x[:, None].contiguous()] * 2, x[:, :20].float(), x[:, 1:21].float())[0],
    ],
)
def test_a_row_does_not_depend_on_the_others(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(50, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    together = function(x)
    for row in (0, 15, 16, 49):
        assert torch.equal(function(x[row : row + 1].contiguous())[0], together[row])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_travels(value: float) -> None:
    x = torch.ones(2, 40).bfloat16()
    x[1, 3] = value
    normed = native.rms_norm(x, torch.ones(40), 1e-6)
    assert normed[0].isfinite().all()
    assert torch.equal(normed.isnan(), rms_norm.reference(x, torch.ones(40), 1e-6).isnan())
    for function, operation in ((native.silu_mul, silu_mul), (native.gelu_mul, gelu_mul)):
        for sign in (1, -1):
            assert torch.equal(function(x * sign).isnan(), operation.reference(x * sign).isnan())


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_instruction_set_passes_these_tests(isa: str, run_tests_with_isa: Any) -> None:
    run_tests_with_isa(isa, __file__)
