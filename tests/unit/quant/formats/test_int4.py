from __future__ import annotations

import pytest
import torch

from tokenmill.quant.formats.int4 import Int4, grid, pack
from tokenmill.quant.weight import Quantized


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(format: Int4, weight: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    """Root mean square of the rounding errors, relative to the weights."""
    wrong = (format.quantize(weight, importance).dequantize() - weight).square()
    return float((wrong.mean() / weight.square().mean()).sqrt())


def test_a_byte_holds_the_even_column_low() -> None:
    assert pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize(("group", "symmetric", "bits"), [(32, True, 4.25), (32, False, 4.5), (128, False, 4.125)])
def test_storage(group: int, symmetric: bool, bits: float) -> None:
    """4 bits and 8 for the multiplier and, unless symmetric, for the offset of a group; 32 for the scale of a row."""
    quantized = Int4(group, symmetric).quantize(random(8, 1024))
    assert quantized.bits_per_weight == bits + 32 / 1024
    assert (quantized.offsets is None) == symmetric


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_gets_the_nearest_level_of_its_group(symmetric: bool) -> None:
    weight = random(6, 128)
    quantized = Int4(32, symmetric).quantize(weight)
    # The scale of a row is fitted last, and moves the levels a little.
    offsets = quantized.multipliers >> 1 if quantized.offsets is None else quantized.offsets
    levels = (torch.arange(16) * quantized.multipliers.unsqueeze(-1).int() >> 4) - offsets.unsqueeze(-1).int()
    levels = levels * quantized.scales.view(-1, 1, 1)
    distance = (weight.view(6, 4, 32, 1) - levels.unsqueeze(2)).abs().amin(-1)
    got = (quantized.dequantize() - weight).abs().view(6, 4, 32)
    assert (got <= distance + 0.02 * weight.view(6, 4, 32).abs()).all()


def test_the_search_beats_rounding_to_the_whole_range() -> None:
    weight = random(64, 256)
    groups = weight.view(64, -1, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = ((groups - low) / step).round() * step + low
    simple = float(((plain - groups).square().mean() / weight.square().mean()).sqrt())
    assert error(Int4(), weight) < 0.95 * simple


def test_smaller_groups_and_offsets_lose_less() -> None:
    weight = random(64, 512)
    assert error(Int4(32), weight) < error(Int4(64), weight) < error(Int4(128), weight)
    assert error(Int4(32), weight) < error(Int4(32, symmetric=True), weight)


def test_an_important_input_is_met_more_closely() -> None:
    weight, importance = random(64, 64), torch.ones(64)
    importance[5] = 100.0
    plain, weighed = (Int4().quantize(weight, given).dequantize() - weight for given in (None, importance))
    assert weighed[:, 5].square().mean() < 0.5 * plain[:, 5].square().mean()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("inputs", [1, 7, 33, 100])
def test_inputs_need_not_fill_a_group(inputs: int, symmetric: bool) -> None:
    quantized = Int4(32, symmetric).quantize(random(5, inputs))
    assert quantized.shape == (5, inputs)
    assert quantized.dequantize().shape == (5, inputs)
    assert error(Int4(32, symmetric), random(5, inputs)) < 0.12


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-6, 1e6])
def test_a_constant_row(value: float, symmetric: bool) -> None:
    weight = torch.full((2, 64), value)
    torch.testing.assert_close(Int4(32, symmetric).quantize(weight).dequantize(), weight, rtol=0.01, atol=0)


def test_no_whole_number_leaves_eight_bits() -> None:
    """Groups far from each other in size, and levels far to one side of zero."""
    weight = random(16, 128) * torch.logspace(-4, 0, 4).repeat_interleave(32) + 3 * random(16, 1)
    quantized = Int4().quantize(weight)
    again = Quantized(quantized.q, quantized.scales, 128, 32, quantized.multipliers, quantized.offsets)
    q, m, b = again.digits().int().view(16, 4, 32), again.multipliers.int(), again.offsets.int()
    exact = (q * m.unsqueeze(-1) >> 4) - b.unsqueeze(-1)
    assert exact.abs().max() <= 127
    assert torch.equal(exact.flatten(1), quantized.whole().int())


def test_a_grid_is_near_to_the_levels_asked_for() -> None:
    steps = torch.rand(10, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    lows = -steps * (15 * torch.rand(10, 4, generator=torch.Generator().manual_seed(1)))
    scales, multipliers, offsets = grid(lows, steps, symmetric=False)
    q = torch.arange(16)
    wanted = lows.unsqueeze(-1) + q * steps.unsqueeze(-1)
    got = ((q * multipliers.unsqueeze(-1).int() >> 4) - offsets.unsqueeze(-1).int()) * scales.view(-1, 1, 1)
    assert ((got - wanted).abs() <= 2 * scales.view(-1, 1, 1)).all()
