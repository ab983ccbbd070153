"""GPTQ against its definition, step by step as the paper's section 3 has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenmill.errors import ModelError
from tokenmill.quant.grid import fit, nearest
from tokenmill.quant.method import Statistics
from tokenmill.quant.methods.gptq import quantize
from tokenmill.quant.methods.rtn import quantize as rtn
from tokenmill.quant.scheme import Scheme

INT4 = Scheme("pack-quantized", 4, 32, False)


def seen(tokens: int, inputs: int) -> Statistics:
    random = torch.Generator().manual_seed(inputs)
    stats = Statistics(inputs)
    mixing = torch.randn(inputs, inputs, generator=random)
    stats.add(torch.randn(tokens, inputs, generator=random) @ mixing)
    return stats


def by_definition(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Tensor:
    """Equation 3, one input at a time in float64: the inverse of what is left of H is computed anew each time."""
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    w, out = weight.double().clone(), torch.empty_like(weight)
    size = scheme.group or weight.shape[1]
    costs = torch.stack([1 / torch.linalg.inv(damped[i:, i:])[0, 0] for i in range(len(damped))]).float()
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(damped[i:, i:])
        if i % size == 0:
            scales, zeros = fit(w[:, i : i + size].float(), costs[i : i + size], scheme)
        out[:, i] = (nearest(w[:, i].float(), scales, zeros, scheme) - zeros) * scales
        w[:, i:] -= ((w[:, i] - out[:, i]) / inverse[0, 0]).unsqueeze(1) * inverse[0]
    return out


@pytest.mark.parametrize("scheme", [INT4, Scheme("int-quantized", 8, 0, True)], ids=str)
@pytest.mark.parametrize("inputs", [32, 160, 288])
def test_it_is_what_the_paper_defines(scheme: Scheme, inputs: int) -> None:
    """Across the borders of groups and blocks. Float32 may turn a few roundings, which then move all that follow."""
    stats = seen(4 * inputs, inputs)
    weight = torch.randn(12, inputs, generator=torch.Generator().manual_seed(3))
    hessian = stats.hessian().double()
    expected, found = by_definition(weight, stats.hessian(), scheme), quantize(weight, stats, scheme).dequantize()
    assert (found == expected).double().mean() > 0.9
    costs = [float(torch.trace((each - weight).double() @ hessian @ (each - weight).double().T)) for each in
             (found, expected, rtn(weight, stats, scheme).dequantize())]  # fmt: skip
    assert costs[0] == pytest.approx(costs[1], rel=0.05)
    assert costs[0] < 0.8 * costs[2]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_told(wrong: float) -> None:
    stats = Statistics(32)
    stats.add(torch.full((2, 32), wrong))
    with pytest.raises(ModelError) as caught:
        quantize(torch.ones(2, 32), stats, INT4)
    assert caught.value.code == "calibration_failed"
