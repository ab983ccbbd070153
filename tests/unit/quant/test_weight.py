from __future__ import annotations

import pytest
import torch

from tokenmill.quant.formats.int4 import Int4
from tokenmill.quant.formats.int8 import Int8
from tokenmill.quant.weight import Quantized, linear, quantize_rows, rows, whole_numbers

FORMATS = pytest.mark.parametrize("format", [Int8(), Int4(), Int4(64, symmetric=True)], ids=["int8", "int4", "sym"])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_four_bits_stand_for_whole_numbers() -> None:
    digits = torch.arange(16, dtype=torch.uint8).view(1, 1, 16)
    multiplier, offset = torch.tensor([[37]], dtype=torch.uint8), torch.tensor([[20]], dtype=torch.uint8)
    assert whole_numbers(digits, multiplier, offset).tolist() == [[[q * 37 // 16 - 20 for q in range(16)]]]
    symmetric = whole_numbers(digits, multiplier, None)
    assert symmetric.tolist() == [[[q * 37 // 16 - 18 for q in range(16)]]]
    assert symmetric[0, 0, 8] == 0


@FORMATS
def test_a_product_is_that_of_the_whole_numbers(format: Int8 | Int4) -> None:
    """In float64, from what the object says it computes with; K is beyond what float32 adds exactly at once."""
    weight, x, bias = format.quantize(random(21, 2500)), random(5, 2500, seed=1), random(21, seed=2)
    whole, scales = quantize_rows(x)
    exact = (whole.double() @ weight.whole().double().T) * scales.double().unsqueeze(1) * weight.scales.double()
    torch.testing.assert_close(linear(x, weight, bias).double(), exact + bias.double(), rtol=1e-6, atol=1e-6)
    assert (weight.whole().abs().int() <= 127).all()


@FORMATS
def test_a_row_does_not_depend_on_the_others(format: Int8 | Int4) -> None:
    weight, x = format.quantize(random(40, 96)), random(33, 96, seed=1).bfloat16()
    together = linear(x, weight)
    assert together.dtype == torch.bfloat16
    assert all(torch.equal(linear(x[i : i + 1], weight), together[i : i + 1]) for i in range(33))


def test_activations_are_rounded_to_the_largest_of_their_row() -> None:
    whole, scales = quantize_rows(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-40, 0.0, 0.0]]))
    assert whole.tolist() == [[64.0, -127.0, 32.0], [0.0] * 3, [0.0] * 3]
    torch.testing.assert_close(scales, torch.tensor([2 / 127, 0.0, 1e-40 / 127]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_makes_its_row_so_and_no_other(bad: float) -> None:
    weight, x = Int8().quantize(random(8, 16)), random(3, 16, seed=1)
    expected = linear(x, weight)
    x[1, 5] = bad
    got = linear(x, weight)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


@FORMATS
def test_rows_of_a_table_are_rows_of_the_matrix(format: Int8 | Int4) -> None:
    table, indices = format.quantize(random(30, 70)), torch.tensor([4, 0, 29, 4])
    assert torch.equal(rows(table, indices, torch.bfloat16), table.dequantize()[indices].bfloat16())


@FORMATS
def test_rows_are_independent_so_that_weights_join(format: Int8 | Int4) -> None:
    weight = random(12, 100)
    joined = Quantized.cat([format.quantize(weight[:5]), format.quantize(weight[5:])])
    whole = format.quantize(weight)
    assert torch.equal(joined.dequantize(), whole.dequantize())
    assert joined.shape == (12, 100)
    assert torch.equal(whole[2:4].dequantize(), whole.dequantize()[2:4])
    assert joined.nbytes == whole.nbytes


def test_symmetric_and_asymmetric_rows_join() -> None:
    parts = [Int4(32, symmetric).quantize(random(4, 64, seed=int(symmetric))) for symmetric in (True, False)]
    assert torch.equal(Quantized.cat(parts).dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_rows_of_different_formats_do_not_join() -> None:
    weight = random(4, 64)
    with pytest.raises(ValueError, match="different formats"):
        Quantized.cat([Int8().quantize(weight), Int4().quantize(weight)])
