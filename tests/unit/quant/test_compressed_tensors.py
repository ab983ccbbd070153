"""What is written is what `quant.checkpoint` reads, and what its description says."""

from __future__ import annotations

import pytest
import torch

from tokenmill.quant.checkpoint import optional_tensors, read_linear, tensor_shapes
from tokenmill.quant.compressed_tensors import description, tensors
from tokenmill.quant.method import Statistics
from tokenmill.quant.methods.rtn import quantize
from tokenmill.quant.scheme import Scheme, read_scheme

SCHEMES = [Scheme("int-quantized", 8, 0, True), *(Scheme("pack-quantized", 4, group, False) for group in (32, 64, 128))]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


@schemes
def test_the_description_says_the_scheme(scheme: Scheme) -> None:
    said = description(scheme, ["lm_head"])
    assert read_scheme(said) == scheme
    assert said["ignore"] == ["lm_head"]


@schemes
@pytest.mark.parametrize("outputs", [3, 16])
def test_tensors_are_read_back(scheme: Scheme, outputs: int) -> None:
    weight = torch.randn(outputs, 256, generator=torch.Generator().manual_seed(0))
    rounded = quantize(weight, Statistics(256), scheme)
    written = tensors(rounded, scheme)
    needed = tensor_shapes(scheme, (outputs, 256))
    assert {name: tuple(written[name].shape) for name in needed} == needed
    assert written.keys() - needed.keys() <= optional_tensors(scheme)
    read = read_linear(scheme, written, (outputs, 256), "layer").dequantize()
    # Groups of 4 bits come to lie on steps of 8 bits; see `quant.checkpoint`.
    assert (read - rounded.dequantize()).norm() <= (0.0 if scheme.bits == 8 else 0.015) * weight.norm()


def test_words_hold_their_fields_from_the_lowest_bit_up() -> None:
    scheme = SCHEMES[1]
    rounded = quantize(torch.linspace(-1, 1, 64).view(2, 32), Statistics(32), scheme)
    written = tensors(rounded, scheme)
    word = int(written["weight_packed"][1, 2])
    assert [(word >> 4 * i & 15) - 8 for i in range(8)] == rounded.q[1, 16:24].tolist()
    zeros = int(written["weight_zero_point"][0, 0])
    assert [(zeros >> 4 * i & 15) - 8 for i in range(2)] == rounded.zeros[:, 0].tolist()
    assert written["weight_shape"].tolist() == [2, 32]
