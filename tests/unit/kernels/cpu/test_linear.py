"""Packed weights: what is packed, and what the kernels compute with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("tokenmill.kernels.cpu._native")

from tokenmill.kernels.cpu import _native
from tokenmill.kernels.cpu.packed import PackedWeight, pack

FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {"format": "bf16"},
    "int8": {"format": "int8"},
    "int4": {"format": "int4"},
    "int4_symmetric": {"format": "int4", "symmetric": True},
    "int4_group64": {"format": "int4", "group": 64},
    "int4_group128": {"format": "int4", "group": 128, "symmetric": True},
    "int8_bf16": {"format": "int8", "activations": "bf16"},
    "int4_bf16": {"format": "int4", "activations": "bf16"},
    "int4_group128_bf16": {"format": "int4", "group": 128, "symmetric": True, "activations": "bf16"},
}
SHAPES = [(1, 1), (7, 33), (33, 7), (100, 100), (31, 257), (224, 320)]
ROWS = [1, 2, 3, 4, 6, 7, 8, 13, 31, 64, 150]
ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")

formats = pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True)
def two_threads() -> Any:
    before = _native.thread_count()
    _native.set_thread_count(2)
    yield
    _native.set_thread_count(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as the integer formats see them: integers and the scale of each row, both float64."""
    largest = x.float().abs().amax(dim=1, keepdim=True)
    # A tensor over a tensor: torch computes a number over a tensor as a product with the reciprocal.
    inverse = torch.where(largest > 1e-35, torch.tensor(127.0) / largest, 0)
    return torch.round(x.float() * inverse).double(), (largest / 127).double()


def in_whole_numbers(packed: PackedWeight) -> bool:
    return packed.format != "bf16" and packed.activations == "int8"


def expected(packed: PackedWeight, x: Tensor) -> Tensor:
    """x W^T in float64, of exactly the numbers that the kernel multiplies."""
    weight = packed.dequantize().double()
    if not in_whole_numbers(packed):
        return x.double() @ weight.T
    q, scale = rounded(x)
    return q @ weight.T * scale


def close(actual: Tensor, wanted: Tensor, packed: PackedWeight, x: Tensor) -> None:
    """Within the rounding of float32 sums and scales, relative to the size of what was summed up."""
    size = x.double().abs() @ packed.dequantize().double().abs().T
    unit = 2.0**-23 * (8 if in_whole_numbers(packed) else 4 + packed.inputs**0.5)
    if actual.dtype == torch.bfloat16:
        assert ((actual.double() - wanted).abs() <= wanted.abs() * 2.0**-8 + size * unit + 1e-30).all()
    else:
        assert ((actual.double() - wanted).abs() <= size * unit + 1e-30).all()


@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_the_product_with_the_dequantized_weight(shape: tuple[int, int], how: dict[str, Any]) -> None:
    packed = pack(random(*shape), **how)
    for rows in ROWS:
        x = random(rows, shape[1], seed=rows).bfloat16()
        close(packed.linear_f32(x), expected(packed, x), packed, x)
        close(packed.linear(x), expected(packed, x), packed, x)


@formats
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_extreme_scales(scale: float, how: dict[str, Any]) -> None:
    packed = pack(random(40, 96), **how)
    x = (random(5, 96, seed=1) * scale).bfloat16()
    actual = packed.linear_f32(x).double()
    assert ((actual - expected(packed, x)).abs() <= expected(packed, x).abs().amax() * 1e-5).all()


@formats
def test_rows_of_zeros_and_equal_values(how: dict[str, Any]) -> None:
    packed = pack(random(40, 96), **how)
    assert (packed.linear(torch.zeros(3, 96).bfloat16()) == 0).all()
    x = torch.full((3, 96), 0.375).bfloat16()
    close(packed.linear_f32(x), expected(packed, x), packed, x)


@formats
def test_no_rows(how: dict[str, Any]) -> None:
    assert pack(random(40, 96), **how).linear(torch.empty(0, 96, dtype=torch.bfloat16)).shape == (0, 40)


@formats
def test_bias_residual_and_float_output(how: dict[str, Any]) -> None:
    weight, bias = random(70, 96), random(70, seed=1)
    packed, plain = pack(weight, bias=bias, **how), pack(weight, **how)
    x, residual = random(9, 96, seed=2).bfloat16(), random(9, 70, seed=3).bfloat16()
    exact = plain.linear_f32(x)
    assert torch.equal(packed.linear_f32(x), exact + bias)
    assert torch.equal(packed.linear(x), (exact + bias).bfloat16())
    wanted = (residual.float() + (exact + bias)).bfloat16()
    assert packed.linear_add(x, residual) is residual
    assert torch.equal(residual, wanted)


@formats
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("inner", [1, 32, 50, 96])
def test_gated(inner: int, activation: Any, how: dict[str, Any]) -> None:
    weight, bias = random(2 * inner, 64), random(2 * inner, seed=1)
    packed = pack(weight, bias=bias, gated=True, **how)
    plain = pack(weight, bias=bias, **how)
    assert torch.equal(packed.dequantize(), plain.dequantize())
    for rows in (1, 5, 20):
        x = random(rows, 64, seed=2).bfloat16()
        gate, up = plain.linear_f32(x).double().chunk(2, dim=1)
        function = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        torch.testing.assert_close(packed.gated(x, activation).double(), function * up, rtol=2.0**-8, atol=1e-6)


@formats
def test_a_row_does_not_depend_on_the_others(how: dict[str, Any]) -> None:
    packed = pack(random(200, 160), **how)
    x = random(150, 160, seed=1).bfloat16()
    whole = packed.linear_f32(x)
    for count in (1, 2, 3, 5, 6, 7, 11, 50, 149):
        parts = [packed.linear_f32(part) for part in x.split(count)]
        assert torch.equal(torch.cat(parts), whole), count
    chosen = [149, 3, 77]
    assert torch.equal(packed.linear_f32(x[chosen]), whole[chosen])


@formats
def test_a_row_does_not_depend_on_how_many_there_are(how: dict[str, Any]) -> None:
    packed = pack(random(70, 3072), **how)
    x = random(400, 3072, seed=1).bfloat16()
    whole = packed.linear_f32(x)
    for count in (1, 16, 17, 32, 33, 250):
        assert torch.equal(packed.linear_f32(x[:count]), whole[:count]), count
        assert torch.equal(packed.linear_f32(x[-count:]), whole[-count:]), count


@formats
def test_a_row_does_not_depend_on_threads(how: dict[str, Any]) -> None:
    packed = pack(random(400, 160), **how)
    gated = pack(random(400, 160), gated=True, **how)
    x = random(300, 160, seed=1).bfloat16()
    with_two = packed.linear_f32(x), packed.linear_f32(x[:1]), gated.gated(x, "silu")
    for threads in (1, 3):
        _native.set_thread_count(threads)
        assert torch.equal(packed.linear_f32(x), with_two[0])
        assert torch.equal(packed.linear_f32(x[:1]), with_two[1])
        assert torch.equal(gated.gated(x, "silu"), with_two[2])


@formats
def test_strided_rows_and_outputs(how: dict[str, Any]) -> None:
    packed = pack(random(33, 40), **how)
    wide = random(9, 100, seed=1).bfloat16()
    x = wide[:, 7:47]
    out = torch.full((9, 50), 7.0).bfloat16()
    packed.linear(x, out[:, 3:36])
    assert torch.equal(out[:, 3:36], packed.linear(x.contiguous()))
    assert (out[:, :3] == 7).all()
    assert (out[:, 36:] == 7).all()
    columns = wide.T.contiguous().T[:, 7:47]
    assert torch.equal(packed.linear(columns), packed.linear(x.contiguous()))


@formats
def test_memory_after_the_rows_is_not_read(how: dict[str, Any]) -> None:
    packed = pack(random(33, 37), **how)
    x = random(4, 37, seed=1).bfloat16()
    wide = torch.full((4, 64), float("nan")).bfloat16()
    wide[:, :37] = x
    assert torch.equal(packed.linear(wide[:, :37]), packed.linear(x))


@formats
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float, how: dict[str, Any]) -> None:
    packed = pack(random(70, 64).abs() + 0.1, **how)
    x = random(8, 64, seed=1).bfloat16()
    clean = packed.linear(x)
    x[3, 5] = bad
    actual = packed.linear(x)
    assert not actual[3].isfinite().any()
    assert torch.equal(actual[[0, 1, 2, 4, 5, 6, 7]], clean[[0, 1, 2, 4, 5, 6, 7]])


@pytest.mark.parametrize("how", [FORMATS["int8"], FORMATS["int4"], FORMATS["int4_symmetric"]])
def test_a_weight_that_is_not_finite_spoils_its_output_only(how: dict[str, Any]) -> None:
    weight = random(40, 64)
    weight[5, 6] = float("nan")
    actual = pack(weight, **how).linear(random(3, 64, seed=1).bfloat16())
    assert actual[:, 5].isnan().all()
    assert actual[:, :5].isfinite().all()
    assert actual[:, 6:].isfinite().all()


def test_bf16_keeps_every_weight() -> None:
    weight = random(45, 77).bfloat16()
    assert torch.equal(pack(weight, "bf16").dequantize(), weight.float())


def test_int8_rounds_to_the_nearest_of_255_steps() -> None:
    weight = random(45, 77)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    error = (pack(weight, "int8").dequantize() - weight).abs()
    assert (error <= step * 0.5001).all()


@pytest.mark.parametrize(("symmetric", "bound"), [(False, 0.0715), (True, 0.0875)])
def test_int4_error_of_normal_weights(symmetric: bool, bound: float) -> None:
    """Uniform steps over groups of 32 normal values leave 7.0 and 8.6 percent of their size."""
    weight = random(64, 1024)
    error = (pack(weight, "int4", symmetric=symmetric).dequantize() - weight).norm() / weight.norm()
    assert error < bound


def test_int4_searches_for_the_range() -> None:
    """One outlier in a group: keeping its full range would cost more than clipping does."""
    weight = random(32, 128, seed=4)
    packed = pack(weight, "int4", group=128, symmetric=True).dequantize()
    step = torch.maximum(weight.amax(dim=1) / 7, -weight.amin(dim=1) / 8)[:, None]
    plain = (weight / step).round().clamp(-8, 7) * step
    assert (packed - weight).square().sum() < 0.95 * (plain - weight).square().sum()


def test_int4_heeds_importance() -> None:
    weight, importance = random(32, 64), torch.full((64,), 1e-3)
    importance[:8] = 1
    weighted = pack(weight, "int4", importance=importance).dequantize()
    plain = pack(weight, "int4").dequantize()
    assert (weighted - weight)[:, :8].square().sum() < (plain - weight)[:, :8].square().sum()


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_very_different_size(symmetric: bool) -> None:
    """Multipliers and 8-bit weights are relative to the largest group, so that is what bounds the error of all."""
    weight = random(40, 128)
    weight[:, 32:64] *= 1e-3
    weight[:, 64:96] = 0
    weight[:, 96:] = weight[:, 96:].abs() + 1
    packed = pack(weight, "int4", symmetric=symmetric).dequantize()
    assert (packed[:, 64:96] == 0).all()
    unit = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((packed - weight)[:, 32:64].abs() <= 1.5 * unit).all()


@formats
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_those_of_the_matrix(shape: tuple[int, int], how: dict[str, Any]) -> None:
    packed, indices = pack(random(*shape), **how), torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0])
    rows = packed.dequantize()[indices].bfloat16()
    assert torch.equal(packed.rows(indices), rows)
    scale = torch.tensor(3.359375, dtype=torch.bfloat16)
    assert torch.equal(packed.rows(indices, scale.item()), rows * scale)
    assert packed.rows(indices[:0]).shape == (0, shape[1])


def test_bytes() -> None:
    weight = torch.zeros(1024, 1024)
    sizes = {name: pack(weight, **how).nbytes * 8 / weight.numel() for name, how in FORMATS.items()}
    scales = 32 / 1024
    for name in ("int8", "int4", "int4_group128"):
        assert sizes.pop(f"{name}_bf16") == sizes[name]
    assert sizes == {
        "bf16": 16,
        "int8": 8 + scales,
        "int4": 4.5 + scales,
        "int4_symmetric": 4.25 + scales,
        "int4_group64": 4.25 + scales,
        "int4_group128": 4.0625 + scales,
    }


def test_a_packed_weight_lives_on_in_its_tensors() -> None:
    packed = pack(random(50, 96), "int4", bias=random(50, seed=1))
    copies = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    again = PackedWeight("int4", 50, 96, False, 32, copies)
    x = random(3, 96, seed=2).bfloat16()
    assert torch.equal(again.linear(x), packed.linear(x))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_bf16_activations_lose_nothing_to_rounding(format: Any) -> None:
    """One input that is far larger than the others takes all steps of a row of 8 bits, and none of bf16."""
    x = random(3, 96, seed=1).bfloat16()
    x[:, 5] = 1000
    rounds = pack(random(40, 96), format)
    exact = x.double() @ rounds.dequantize().double().T
    lost, kept = ((each.linear_f32(x).double() - exact).norm() for each in (rounds, rounds.taking("bf16")))
    assert kept < 1e-3 * lost


def test_wrong_use_is_refused() -> None:
    packed, gated = pack(random(8, 16), "bf16"), pack(random(8, 16), "bf16", gated=True)
    x = random(2, 16).bfloat16()
    for wrong in (x.float(), x[0], random(2, 15).bfloat16()):
        with pytest.raises(ValueError, match="x must be"):
            packed.linear(wrong)
    for out in (torch.empty(2, 7, dtype=torch.bfloat16), torch.empty(2, 8), torch.empty(8, 2).bfloat16().T):
        with pytest.raises(ValueError, match="output must be"):
            packed.linear(x, out)
    with pytest.raises(ValueError, match="gated"):
        packed.gated(x, "silu")
    with pytest.raises(ValueError, match="gated"):
        gated.linear(x)
    with pytest.raises(ValueError, match="even number"):
        pack(random(7, 16), "bf16", gated=True)
    with pytest.raises(ValueError, match="group"):
        pack(random(8, 16), "int4", group=48)
    with pytest.raises(ValueError, match="weight must be"):
        pack(random(8, 16).half(), "bf16")
    for changed in ({"scales": torch.ones(31)}, {"data": torch.zeros(3)}, {"more": torch.ones(1)}):
        with pytest.raises(ValueError, match="is not made of"):
            PackedWeight("int8", 8, 16, False, 32, pack(random(8, 16), "int8").tensors | changed)
    with pytest.raises(ValueError, match="is not made of"):
        PackedWeight("int8", 8, 16, False, 32, {"data": packed.tensors["data"]})


_ONE_ISA = """
import sys, torch
from tokenmill.kernels.cpu import _native
from tokenmill.kernels.cpu.packed import PackedWeight, pack
_native.set_thread_count(2)
results = {"isa": _native.isa()}
case = torch.load(sys.argv[1])
x = case["x"]
for name, how in case["formats"].items():
    tensors, activations = case["packed"][name], how.get("activations", "int8")
    weight = PackedWeight(how["format"], 100, 96, False, how.get("group", 32), tensors, activations)
    results[name] = {"linear": weight.linear_f32(x), "dequantized": pack(case["weight"], **how).dequantize()}
torch.save(results, sys.argv[2])
"""


@pytest.mark.parametrize("isa", ISAS[: ISAS.index(_native.isa()) + 1])
def test_instruction_sets_agree(isa: str, tmp_path: Path) -> None:
    weight, x = random(100, 96), random(23, 96, seed=1).bfloat16()
    packed = {name: pack(weight, **how) for name, how in FORMATS.items()}
    tensors = {name: one.tensors for name, one in packed.items()}
    torch.save({"x": x, "weight": weight, "formats": FORMATS, "packed": tensors}, tmp_path / "case")
    command = [sys.executable, "-c", _ONE_ISA, str(tmp_path / "case"), str(tmp_path / "results")]
    subprocess.run(command, env={**os.environ, "TOKENMILL_ISA": isa}, check=True)
    results = torch.load(tmp_path / "results")
    assert results["isa"] == isa
    for name, one in packed.items():
        result = results[name]
        if in_whole_numbers(one):
            assert torch.equal(result["linear"], one.linear_f32(x)), "integers are exact"
        else:
            close(result["linear"], expected(one, x), one, x)
        assert (result["dequantized"] - weight).norm() <= (one.dequantize() - weight).norm() * 1.001


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_passes_these_tests(isa: str, run_tests_with_isa: Any) -> None:
    run_tests_with_isa(isa, __file__)


def test_an_unknown_or_missing_instruction_set_is_refused() -> None:
    command = [sys.executable, "-c", "import tokenmill.kernels.cpu._native"]
    result = subprocess.run(command, env={**os.environ, "TOKENMILL_ISA": "sse9"}, capture_output=True, text=True)
    assert result.returncode != 0
    assert "sse9" in result.stderr
    assert "portable" in result.stderr
