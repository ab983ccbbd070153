from __future__ import annotations

import pytest
import torch

from tokenmill.quant.formats.int4 import Int4
from tokenmill.quant.formats.int8 import Int8
from tokenmill.quant.weight import linear, rows

pytest.importorskip("tokenmill.kernels.cpu._native", reason="the native kernels are not built")
panels = pytest.importorskip("tokenmill.quant.panels")
pack = pytest.importorskip("tokenmill.kernels.cpu.packed").pack

formats = pytest.mark.parametrize(
    "format", [Int8(), Int4(), Int4(128), Int4(64, symmetric=True)], ids=["int8", "int4", "128", "symmetric"]
)
sizes = pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (2, 7), (33, 100), (70, 257), (128, 512)])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@formats
@sizes
@pytest.mark.parametrize("gated", [False, True])
def test_native_kernels_compute_with_the_same_weight(
    format: Int8 | Int4, outputs: int, inputs: int, gated: bool
) -> None:
    weight = format.quantize(random(2 * outputs if gated else outputs, inputs))
    assert torch.equal(panels.packed(weight, gated=gated).dequantize(), weight.dequantize())


@formats
@sizes
def test_native_products_are_those_of_the_reference(format: Int8 | Int4, outputs: int, inputs: int) -> None:
    """Sums of the same whole numbers, so equal to the last bit."""
    weight, x, bias = format.quantize(random(outputs, inputs)), random(5, inputs, seed=1).bfloat16(), random(outputs)
    native = panels.packed(weight, bias)
    assert torch.equal(native.linear_f32(x), linear(x.float(), weight, bias))
    assert torch.equal(native.linear(x), linear(x, weight, bias))


@formats
@sizes
def test_rows_come_back(format: Int8 | Int4, outputs: int, inputs: int) -> None:
    weight, indices = format.quantize(random(outputs, inputs)), torch.tensor([outputs - 1, 0, outputs // 2])
    assert torch.equal(panels.packed(weight).rows(indices), rows(weight, indices, torch.bfloat16))


@pytest.mark.parametrize("format", [Int8(), Int4(), Int4(128), Int4(64, symmetric=True)])
@pytest.mark.parametrize("weighted", [False, True])
def test_kernels_round_as_well_as_formats_do(format: Int8 | Int4, weighted: bool) -> None:
    """The same search in other arithmetic."""
    weight = random(96, 512) * random(512, seed=1).exp()
    importance = random(512, seed=2).square() if weighted else None
    how = {"group": format.group, "symmetric": format.symmetric} if isinstance(format, Int4) else {}
    native = pack(weight, "int4" if how else "int8", importance=importance, **how)

    def error(rounded: torch.Tensor) -> float:
        return ((rounded - weight).square() * (1 if importance is None else importance)).sum().item()

    plain = format.quantize(weight, importance)
    assert error(native.dequantize()) == pytest.approx(error(plain.dequantize()), rel=0.01)
