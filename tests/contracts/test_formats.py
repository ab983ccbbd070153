"""What every weight format owes the layers."""

from __future__ import annotations

import pytest
import torch

from tokenmill.quant.scheme import FORMATS
from tokenmill.quant.weight import linear

formats = pytest.mark.parametrize("name", FORMATS.names())

LOSS = {"int8": 0.015, "int4": 0.12}
"""What rounding may take from normally distributed weights or products, relative to their size; others: half."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@formats
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 7), (33, 100), (64, 256)])
def test_round_trip(name: str, outputs: int, inputs: int) -> None:
    weight = random(outputs, inputs)
    before = weight.clone()
    quantized = FORMATS.get(name).quantize(weight)
    assert quantized.shape == (outputs, inputs)
    assert torch.equal(weight, before)
    assert (quantized.dequantize() - weight).norm() <= LOSS.get(name, 0.5) * weight.norm()


@formats
def test_a_matrix_product_is_close(name: str) -> None:
    weight, x = random(64, 512), random(9, 512, seed=1)
    wrong = linear(x, FORMATS.get(name).quantize(weight)) - x @ weight.T
    assert wrong.norm() <= LOSS.get(name, 0.5) * (x @ weight.T).norm()


@formats
def test_rows_are_rounded_by_themselves(name: str) -> None:
    """So that a loader may bring them in pieces."""
    weight, format = random(20, 96), FORMATS.get(name)
    assert torch.equal(format.quantize(weight)[7:9].dequantize(), format.quantize(weight[7:9]).dequantize())


@formats
def test_zeros_stay_zeros(name: str) -> None:
    assert not FORMATS.get(name).quantize(torch.zeros(3, 64)).dequantize().any()


@formats
def test_scale_carries_over(name: str) -> None:
    weight, format = random(8, 64), FORMATS.get(name)
    torch.testing.assert_close(format.quantize(1024 * weight).dequantize(), 1024 * format.quantize(weight).dequantize())


@formats
def test_it_stores_less_than_bfloat16(name: str) -> None:
    assert FORMATS.get(name).quantize(random(8, 1024)).bits_per_weight < 16
