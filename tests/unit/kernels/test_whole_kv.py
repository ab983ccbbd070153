"""Keys and values as whole numbers of a scale."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.kernels.whole_kv import SCALE_BYTES, dequantize, quantize

LARGEST = 2.0**127


@settings(deadline=None)
@given(st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=1, max_size=40))
def test_an_element_is_met_to_half_a_127th_of_the_largest(values):
    x = torch.tensor(values)
    rows = quantize(x)
    assert rows.dtype == torch.int8
    assert rows.shape == (len(values) + SCALE_BYTES,)
    bound = x.abs().max().item()
    error = (dequantize(rows).double() - x.double()).abs().max().item()
    assert error <= (bound / 254 * (1 + 1e-5) if bound >= 1e-30 else bound)
    assert rows[:-SCALE_BYTES].min() >= -127


@settings(deadline=None)
@given(st.floats(2.0**-96, LARGEST, width=32), st.sampled_from([-1.0, 1.0]))
def test_equal_elements_are_met_but_for_the_rounding_of_the_scale(value, sign):
    x = torch.full((3, 24), value * sign)
    torch.testing.assert_close(dequantize(quantize(x)), x, rtol=2e-7, atol=0)


def test_zeros_stay_zeros():
    assert not quantize(torch.zeros(2, 8)).any()
    assert not dequantize(quantize(torch.full((8,), 1e-38))).any()


def test_one_broken_element_breaks_its_row_alone():
    x = torch.ones(3, 8)
    x[1, 2], x[2, 7] = float("nan"), float("-inf")
    back = dequantize(quantize(x))
    assert back[0].isfinite().all()
    assert back[1:].isnan().all()
    assert not quantize(x)[1:, :-SCALE_BYTES].any()


def test_a_type_is_rounded_once():
    x = torch.randn(5, 16).bfloat16()
    assert torch.equal(quantize(x), quantize(x.float()))
