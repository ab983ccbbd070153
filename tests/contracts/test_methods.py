"""What every method of rounding weights owes the checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenmill.quant.grid import limits
from tokenmill.quant.method import METHODS, Rounded, Statistics
from tokenmill.quant.scheme import Scheme

INT8 = Scheme("int-quantized", 8, 0, True)
INT4 = Scheme("pack-quantized", 4, 32, False)

methods = pytest.mark.parametrize("name", METHODS.names())
schemes = pytest.mark.parametrize("scheme", [INT8, INT4, Scheme("pack-quantized", 4, 128, False)], ids=str)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(inputs: Tensor) -> Statistics:
    stats = Statistics(inputs.shape[1])
    stats.add(inputs)
    return stats


def alike(tokens: int, inputs: int) -> Tensor:
    """Inputs that go together in part and are not all of one size, as activations are."""
    mixed = random(tokens, inputs // 4, seed=1) @ random(inputs // 4, inputs, seed=2) / inputs**0.5
    return (mixed + 0.3 * random(tokens, inputs, seed=3)) * random(inputs, seed=4).exp()


def output_error(weight: Tensor, rounded: Rounded, x: Tensor) -> float:
    return float((x @ (rounded.dequantize() - weight).T).square().mean())


@methods
@schemes
def test_outputs_are_at_least_as_near_as_after_plain_rounding(name: str, scheme: Scheme) -> None:
    weight, x = random(48, 256), alike(1000, 256)
    stats = seen(x)
    errors = [output_error(weight, METHODS.get(each).quantize(weight, stats, scheme), x) for each in (name, "rtn")]
    assert errors[0] <= errors[1]


@methods
@schemes
def test_what_it_gives_fits_the_scheme(name: str, scheme: Scheme) -> None:
    weight = random(5, 256)
    before = weight.clone()
    rounded = METHODS.get(name).quantize(weight, seen(alike(300, 256)), scheme)
    low, high = limits(scheme)
    assert torch.equal(weight, before)
    assert (rounded.q.dtype, rounded.q.shape) == (torch.int8, (5, 256))
    assert low <= int(rounded.q.min()) <= int(rounded.q.max()) <= high
    assert rounded.scales.shape == rounded.zeros.shape == (5, scheme.groups(256))
    assert torch.equal(rounded.scales, rounded.scales.bfloat16().float())
    assert low <= int(rounded.zeros.min()) <= int(rounded.zeros.max()) <= high
    if scheme.symmetric:
        assert not rounded.zeros.any()


@methods
@schemes
def test_zeros_stay_zeros(name: str, scheme: Scheme) -> None:
    rounded = METHODS.get(name).quantize(torch.zeros(3, 128), seen(alike(50, 128)), scheme)
    assert not rounded.dequantize().any()


@methods
@schemes
def test_inputs_that_were_never_seen_keep_their_weights(name: str, scheme: Scheme) -> None:
    weight, x = random(16, 128), alike(400, 128)
    x[:, 40:50] = 0
    rounded = METHODS.get(name).quantize(weight, seen(x), scheme)
    wrong = (rounded.dequantize() - weight)[:, 40:50]
    assert wrong.norm() <= 0.25 * weight[:, 40:50].norm()


@methods
def test_it_may_have_seen_fewer_tokens_than_there_are_inputs(name: str) -> None:
    weight, x = random(8, 128), alike(3, 128)
    rounded = METHODS.get(name).quantize(weight, seen(x), INT4)
    assert (rounded.dequantize() - weight).norm() <= 0.3 * weight.norm()


@methods
def test_it_gives_the_same_each_time(name: str) -> None:
    weight, stats = random(8, 128), seen(alike(200, 128))
    first, second = (METHODS.get(name).quantize(weight, stats, INT4) for _ in range(2))
    assert torch.equal(first.dequantize(), second.dequantize())
