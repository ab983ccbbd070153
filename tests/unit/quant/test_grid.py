from __future__ import annotations

import pytest
import torch

from tokenmill.quant.grid import fit, limits, nearest
from tokenmill.quant.scheme import Scheme

INT8 = Scheme("int-quantized", 8, 0, True)
INT4 = Scheme("pack-quantized", 4, 32, False)
ALIKE = torch.ones(())


def test_a_symmetric_range_has_as_many_steps_on_either_side() -> None:
    assert (limits(INT8), limits(INT4)) == ((-127, 127), (-8, 7))


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_weights_that_lie_on_a_grid_are_met(scheme: Scheme, sign: float) -> None:
    low, high = limits(scheme)
    w = sign * 0.125 * torch.arange(low, high + 1).float()
    scales, zeros = fit(w, ALIKE, scheme)
    assert torch.equal((nearest(w, scales, zeros, scheme) - zeros) * scales, w)


def test_zero_can_always_be_written() -> None:
    """Also where all weights of a group lie far to one side."""
    w = torch.tensor([[5.0, 6.0, 7.0, 5.5], [-5.0, -6.0, -7.0, -5.5]])
    scales, zeros = fit(w, ALIKE, INT4)
    assert (limits(INT4)[0] <= zeros).all()
    assert (zeros <= limits(INT4)[1]).all()
    restored = (nearest(w, scales.unsqueeze(1), zeros.unsqueeze(1), INT4) - zeros.unsqueeze(1)) * scales.unsqueeze(1)
    assert ((restored - w).abs() <= 0.6 * scales.unsqueeze(1)).all()


def test_the_important_weights_are_met_best() -> None:
    random = torch.Generator().manual_seed(0)
    w = torch.randn(200, 32, generator=random)
    w[:, 0] *= 6  # leaving these short makes the others' steps finer
    importance = torch.ones(32)
    errors = []
    for weight in (1.0, 100.0):
        importance[0] = weight
        scales, zeros = (each.unsqueeze(1) for each in fit(w, importance, INT4))
        errors.append(((nearest(w, scales, zeros, INT4) - zeros) * scales - w).square().sum(0))
    assert errors[1][0] < errors[0][0]
    assert errors[1][1:].sum() > errors[0][1:].sum()
