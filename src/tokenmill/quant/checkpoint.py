"""Linear weights of quantized checkpoints, read into the form that kernels compute with.

Three tools write nearly all such checkpoints. A linear layer ``name.weight`` [N, K] becomes a few tensors ``name.*``:

    GPTQ                qweight int32 [K * bits / 32, N], 32 / bits inputs to a word; qzeros int32
                        [groups, N * bits / 32]; scales [groups, N]; g_idx int32 [K], the group of each input
    AWQ                 qweight int32 [K, N / 8], 8 outputs to a word in the order 0 2 4 6 1 3 5 7; qzeros int32
                        [groups, N / 8], in that order too; scales [groups, N]
    compressed-tensors  pack-quantized: weight_packed int32 [N, ceil(K * bits / 32)]; weight_scale [N, groups];
                        weight_zero_point int32 [ceil(N * bits / 32), groups] if asymmetric; weight_shape [2]
                        int-quantized: weight int8 [N, K]; weight_scale [N, 1]

and in each ``weight = scale * (q - zero)`` with one scale and zero point per group of inputs. Words hold their fields
from the lowest bit up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.errors import ModelError
from tokenmill.quant.formats import int4, int8
from tokenmill.quant.scheme import Scheme
from tokenmill.quant.weight import LIMIT, Quantized

__all__ = ["optional_tensors", "read_linear", "tensor_shapes"]

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word outputs 0 to 7 are."""

_GROUPS = (128, 64, 32)
"""Sizes of groups that kernels know, the cheapest first."""


def tensor_shapes(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors that a quantized linear layer must have: the last part of the name and the shape.

    Args:
        shape: N and K.
    """
    outputs, inputs = shape
    groups, fields = scheme.groups(inputs), 32 // scheme.bits
    match scheme.layout:
        case "gptq" | "gptq_v2":
            words = (-(-inputs // fields), outputs)
            return {"qweight": words, "qzeros": (groups, -(-outputs // fields)), "scales": (groups, outputs)}
        case "awq":
            words = (inputs, -(-outputs // fields))
            return {"qweight": words, "qzeros": (groups, words[1]), "scales": (groups, outputs)}
        case "int-quantized":
            return {"weight": shape, "weight_scale": (outputs, 1)}
        case "pack-quantized":
            found: dict[str, tuple[int, ...]] = {
                "weight_packed": (outputs, -(-inputs // fields)),
                "weight_scale": (outputs, groups),
            }
            return found if scheme.symmetric else found | {"weight_zero_point": (-(-outputs // fields), groups)}


def optional_tensors(scheme: Scheme) -> frozenset[str]:
    """Last parts of the names of tensors that a quantized linear layer may have besides."""
    gptq = scheme.layout in ("gptq", "gptq_v2")
    return frozenset({"g_idx"} if gptq else {"weight_shape", "weight_g_idx", "input_scale", "input_zero_point"})


def read_linear(scheme: Scheme, tensors: Mapping[str, Tensor], shape: tuple[int, ...], name: str) -> Quantized:
    """One linear layer.

    4-bit weights become `formats.int4`: the stored q as they are, scales and zero points to 8 bits. 8-bit weights
    become `formats.int8`; those in groups or with a zero point are rounded once more for it.

    Args:
        tensors: by the last part of their names; see `tensor_shapes` and `optional_tensors`.
        shape: N and K.
        name: for messages.

    Raises:
        ModelError: ``unsupported_model`` when the inputs are not in the order of their groups.
    """
    order = tensors.get("g_idx", tensors.get("weight_g_idx"))
    if order is not None and not _in_order(order, scheme, shape[1]):
        raise ModelError(
            "unsupported_model",
            f"The inputs of {name!r} are not in the order of their groups (desc_act with act-order groups): "
            "each product would have to gather its activations first. Quantize with desc_act=False.",
            name,
        )
    if scheme.layout == "int-quantized":
        return Quantized(tensors["weight"], tensors["weight_scale"].float().flatten(), shape[1])
    q, zeros, scales = _fields(scheme, tensors, shape)
    if scheme.bits == 4:
        return _four_bits(q, zeros, scales, scheme.group)
    if scheme.group == 0 and bool((zeros == 128).all()):
        # -128 has no counterpart, and 1/128 of the largest weight is less than half a step of its rounding.
        return Quantized((q.short() - 128).clamp_(min=-127).char(), scales.flatten(), shape[1])
    size = scheme.group or shape[1]
    steps = q.float() - zeros.repeat_interleave(size, dim=1)[:, : shape[1]]
    return int8.FORMAT.quantize(steps.mul_(scales.repeat_interleave(size, dim=1)[:, : shape[1]]))


def _in_order(order: Tensor, scheme: Scheme, inputs: int) -> bool:
    expected = torch.arange(inputs) // (scheme.group or inputs)
    return torch.equal(order.long(), expected)


def _fields(scheme: Scheme, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, K] uint8, zero points [N, groups] uint8 and scales [N, groups] float32 of a layer."""
    bits, middle = scheme.bits, 1 << (scheme.bits - 1)
    outputs, inputs = shape
    match scheme.layout:
        case "gptq" | "gptq_v2":
            q = _unpack(tensors["qweight"].T, bits)
            zeros = _unpack(tensors["qzeros"], bits).T
            if scheme.layout == "gptq":
                zeros = (zeros + 1) & ((1 << bits) - 1)  # a stored 15 stands for 0
            scales = tensors["scales"].T
        case "awq":
            q, zeros = (_awq(tensors[part]).T for part in ("qweight", "qzeros"))
            scales = tensors["scales"].T
        case _:
            q, scales = _unpack(tensors["weight_packed"], bits), tensors["weight_scale"]
            zeros = torch.full_like(scales, middle, dtype=torch.uint8)
            if "weight_zero_point" in tensors:
                zeros = _unpack(tensors["weight_zero_point"].T, bits).T
    return q[:outputs, :inputs].contiguous(), zeros[:outputs].contiguous(), scales.float().contiguous()


def _unpack(words: Tensor, bits: int) -> Tensor:
    """[R, W] int32 to [R, W * 32 / bits] uint8."""
    if bits == 8:
        return words.contiguous().view(torch.uint8)
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)


def _awq(words: Tensor) -> Tensor:
    """[R, W] int32 to [R, 8 W] uint8 of 4 bits, outputs back in their order."""
    fields = _unpack(words, 4)
    return fields.view(fields.shape[0], -1, 8)[:, :, list(_AWQ_ORDER)].flatten(1)


def _four_bits(q: Tensor, zeros: Tensor, scales: Tensor, group: int) -> Quantized:
    """q [N, K], zero points and scales [N, groups] in the form of `formats.int4`.

    Groups that are whole multiples of a size kernels know are cut into groups of that size.
    """
    inputs = q.shape[1]
    flipped = scales < 0  # some tools let the sign of a scale choose the side that has 8 of the 16 steps
    size = next(size for size in _GROUPS if (group or inputs) % size == 0 or size == _GROUPS[-1])
    whole = -(-inputs // size)
    parts = -(-(group or inputs) // size)
    zeros, scales, flipped = (
        each.repeat_interleave(parts, dim=1)[:, :whole]
        for each in (torch.where(flipped, 15 - zeros, zeros), scales.abs(), flipped)
    )
    q = F.pad(q, (0, whole * size - inputs)).view(-1, whole, size)
    q = torch.where(flipped.unsqueeze(-1), 15 - q, q).flatten(1)
    if group:
        rows, multipliers, offsets = _nearest_grid(zeros, scales)
    else:  # one scale for all of a row: steps of a whole number of whole numbers are exact
        steps = LIMIT // torch.maximum(zeros, 15 - zeros)
        rows, multipliers, offsets = scales[:, 0] / steps[:, 0], 16 * steps, zeros * steps
    symmetric = torch.equal(offsets, multipliers >> 1)
    return Quantized(int4.pack(q), rows, inputs, size, multipliers, None if symmetric else offsets.contiguous())


def _nearest_grid(zeros: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales [N], multipliers and offsets [N, groups] of the levels nearest to ``(q - zeros) * scales``.

    The rounding of ``floor(q * m / 16)`` pulls one way, and for some m no offset makes up for it: a shift that all
    weights of a group share adds up over a product. So the neighbours of the nearest m are tried too.
    """
    steps = torch.arange(16, device=zeros.device)
    rows, multipliers, _ = int4.grid(-zeros.float() * scales, scales, True)
    inverse = torch.where(rows > 0, 1 / rows, 0).view(-1, 1, 1)
    target = (steps - zeros.unsqueeze(-1).float()) * scales.unsqueeze(-1) * inverse
    symmetric = bool((zeros == 8).all())
    best = torch.full(scales.shape, torch.inf, device=scales.device)
    chosen, offsets = multipliers, multipliers
    for change in (0, -1, 1):
        m = (multipliers.int() + change).clamp_(0, 255)
        levels = (steps * m.unsqueeze(-1)) >> 4
        b = m >> 1 if symmetric else (levels - target).mean(-1).round_().int()
        b = torch.maximum(b.clamp_(0, LIMIT), levels[..., 15] - LIMIT)
        error = (levels - b.unsqueeze(-1) - target).square_().mean(-1)
        better = error < best
        best = torch.where(better, error, best)
        chosen, offsets = torch.where(better, m, chosen), torch.where(better, b, offsets)
    return rows, chosen.byte(), offsets.byte()
