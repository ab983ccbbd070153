"""Checkpoints are written here one bit field at a time, from known integers, and read back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.errors import ModelError
from tokenmill.quant.checkpoint import optional_tensors, read_linear, tensor_shapes
from tokenmill.quant.scheme import Layout, Scheme
from tokenmill.quant.weight import Quantized

N, K = 16, 256
Ints = NDArray[np.int64]


def known(bits: int, groups: int, symmetric: bool) -> tuple[Ints, Ints, NDArray[np.float32]]:
    """q [N, K], zero points and scales [N, groups]; the ends of all ranges occur."""
    random = np.random.default_rng(bits + groups)
    q = random.integers(0, 1 << bits, (N, K))
    q[:, 0], q[:, 1] = 0, (1 << bits) - 1
    zeros = np.full((N, groups), 1 << (bits - 1))
    if not symmetric:
        zeros = random.integers(0, 1 << bits, (N, groups))
        zeros[0, 0], zeros[1, 0] = 0, (1 << bits) - 1
    scales = random.uniform(0.01, 0.03, (N, groups)).astype(np.float16).astype(np.float32)
    return q, zeros, scales


def words(fields: list[list[int]], bits: int) -> Tensor:
    """Each list of fields as a row of int32 words, the first field in the lowest bits."""
    per = 32 // bits
    rows = []
    for row in fields:
        padded = row + [0] * (-len(row) % per)
        chunks = [padded[i : i + per] for i in range(0, len(padded), per)]
        rows.append([sum(field << (bits * i) for i, field in enumerate(chunk)) for chunk in chunks])
    return torch.from_numpy(np.array(rows, np.uint32).view(np.int32).copy())


def write(scheme: Scheme, q: Ints, zeros: Ints, scales: NDArray[np.float32]) -> dict[str, Tensor]:
    if scheme.layout == "int-quantized":
        return {"weight": torch.from_numpy((q - 128).astype(np.int8)), "weight_scale": torch.from_numpy(scales)}
    if scheme.layout == "pack-quantized":
        found = {"weight_packed": words(q.tolist(), scheme.bits), "weight_scale": torch.from_numpy(scales)}
        if not scheme.symmetric:
            found["weight_zero_point"] = words(zeros.T.tolist(), scheme.bits).T.contiguous()
        return found | {"weight_shape": torch.tensor([N, K])}
    half = torch.from_numpy(scales.T.copy()).half()
    if scheme.layout == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]  # field i of a word holds this output of its eight

        def mixed(rows: Ints) -> list[list[int]]:
            return [[int(row[8 * word + i]) for word in range(N // 8) for i in order] for row in rows]

        return {"qweight": words(mixed(q.T), 4), "qzeros": words(mixed(zeros.T), 4), "scales": half}
    stored = (zeros - 1) % (1 << scheme.bits) if scheme.layout == "gptq" else zeros
    group = scheme.group or K
    return {
        "qweight": words(q.tolist(), scheme.bits).T.contiguous(),
        "qzeros": words(stored.T.tolist(), scheme.bits),
        "scales": half,
        "g_idx": torch.tensor([k // group for k in range(K)], dtype=torch.int32),
    }


def read_back(scheme: Scheme) -> tuple[Quantized, Tensor, NDArray[np.float32]]:
    """What is read, the weights that were written, and the scales."""
    groups = K // scheme.group if scheme.group else 1
    q, zeros, scales = known(scheme.bits, groups, scheme.symmetric)
    tensors = write(scheme, q, zeros, scales)
    needed = tensor_shapes(scheme, (N, K))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items() if name in needed} == needed
    assert tensors.keys() - needed.keys() <= optional_tensors(scheme)
    size = K // groups
    weight = (q - zeros.repeat(size, 1)) * scales.repeat(size, 1)
    return read_linear(scheme, tensors, (N, K), "layer"), torch.from_numpy(weight).float(), scales


FOUR: list[tuple[Layout, bool]] = [
    ("gptq", True), ("gptq", False), ("gptq_v2", True), ("gptq_v2", False), ("awq", False), ("pack-quantized", True),
    ("pack-quantized", False),
]  # fmt: skip
four_bits = pytest.mark.parametrize(("layout", "symmetric"), FOUR)


@four_bits
@pytest.mark.parametrize("group", [32, 64, 128])
def test_four_bits_in_groups_are_met_to_a_step_of_eight(layout: Layout, symmetric: bool, group: int) -> None:
    read, weight, _ = read_back(Scheme(layout, 4, group, symmetric))
    assert (read.shape, read.group, read.offsets is None) == ((N, K), group, symmetric)
    assert ((read.dequantize() - weight).abs() <= 1.5 * read.scales.unsqueeze(1)).all()
    assert (read.dequantize() - weight).norm() <= 0.01 * weight.norm()


@four_bits
def test_what_eight_bits_lose_does_not_pull_one_way(layout: Layout, symmetric: bool) -> None:
    """A shift that all weights of a row share would add up over a product."""
    read, weight, _ = read_back(Scheme(layout, 4, 32, symmetric))
    shift = (read.dequantize() - weight).mean() / read.scales.mean()
    assert abs(float(shift)) < 0.06


@four_bits
def test_four_bits_per_channel_are_exact(layout: Layout, symmetric: bool) -> None:
    read, weight, _ = read_back(Scheme(layout, 4, 0, symmetric))
    torch.testing.assert_close(read.dequantize(), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int-quantized", 8, 0, True),
        Scheme("pack-quantized", 8, 0, True),
        Scheme("gptq", 8, 0, True),
        Scheme("gptq_v2", 8, 0, True),
    ],
    ids=lambda scheme: scheme.layout,
)
def test_eight_bits_per_channel_are_kept(scheme: Scheme) -> None:
    read, weight, scales = read_back(scheme)
    # -128 becomes -127 unless the checkpoint stores it in so many words.
    lowest = -128 if scheme.layout == "int-quantized" else -127
    expected = weight.clamp(min=lowest * torch.from_numpy(scales))
    torch.testing.assert_close(read.dequantize(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("layout", "symmetric", "group"), [("gptq", True, 128), ("pack-quantized", False, 0)])
def test_other_eight_bits_are_rounded_once_more(layout: Layout, symmetric: bool, group: int) -> None:
    read, weight, _ = read_back(Scheme(layout, 8, group, symmetric))
    assert read.group == 0
    assert ((read.dequantize() - weight).abs() <= 0.51 * read.scales.unsqueeze(1)).all()


def test_a_negative_scale_turns_its_group_over() -> None:
    scheme = Scheme("gptq_v2", 4, 64, True)
    q, zeros, scales = known(4, K // 64, True)
    scales[::2, 1] *= -1
    weight = torch.from_numpy((q - zeros.repeat(64, 1)) * scales.repeat(64, 1)).float()
    read = read_linear(scheme, write(scheme, q, zeros, scales), (N, K), "layer")
    assert (read.dequantize() - weight).norm() <= 0.01 * weight.norm()


def test_a_group_that_no_kernel_knows_is_cut_up() -> None:
    read, weight, _ = read_back(Scheme("gptq", 4, 256, True))
    assert read.group == 128
    assert (read.dequantize() - weight).norm() <= 0.01 * weight.norm()


def test_inputs_out_of_the_order_of_their_groups_are_refused() -> None:
    scheme = Scheme("gptq", 4, 128, True)
    tensors = write(scheme, *known(4, 2, True))
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(ModelError, match="desc_act") as caught:
        read_linear(scheme, tensors, (N, K), "model.layers.0.mlp.down_proj.weight")
    assert caught.value.field == "model.layers.0.mlp.down_proj.weight"
