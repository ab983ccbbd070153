from __future__ import annotations

import torch

from tokenmill.quant.formats.int8 import FORMAT


def test_the_largest_weight_of_a_row_decides_its_scale() -> None:
    quantized = FORMAT.quantize(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    assert quantized.whole().tolist() == [[64, -127, 32], [0, 0, 0]]
    torch.testing.assert_close(quantized.scales, torch.tensor([2 / 127, 0.0]))


def test_no_weight_moves_by_more_than_half_a_step() -> None:
    weight = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    quantized = FORMAT.quantize(weight)
    assert ((quantized.dequantize() - weight).abs() <= quantized.scales.unsqueeze(1) * 0.501).all()
    assert quantized.bits_per_weight == 8 + 32 / 300
