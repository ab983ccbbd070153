"""Dense layers over weights packed for the native kernels.

A weight is packed once and used many times. Its form in memory is described in `linear.h`; here are the tensors that
hold it and the calls that use it. Formats:

* ``bf16``: products of bfloat16, summed up in float32;
* ``int8``: weights of 8 bits with a float32 scale per output;
* ``int4``: weights of 4 bits in groups along the inputs; a group has an 8-bit multiplier and, unless symmetric, an
  8-bit offset, which make it a group of 8-bit weights, and the rest is as in ``int8``.

Weights of whole numbers meet activations that are rounded to 8 bits with a scale per row at each call, or that stay
bfloat16, which holds the whole numbers too: see `PackedWeight.taking`.

A row's result depends on nothing but the row and the weight: not on other rows, threads or how rows are cut into calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tokenmill.kernels.cpu import _native
from tokenmill.kernels.memory import zeros

__all__ = ["Activation", "Format", "PackedWeight", "pack"]

Format = Literal["bf16", "int8", "int4"]
Activation = Literal["silu", "gelu_tanh"]

_PANEL = 32
"""Outputs that lie together."""
_FORMATS = {"bf16": _native.Format.bf16, "int8": _native.Format.int8, "int4": _native.Format.int4}
_GATES = {"silu": _native.Epilogue.silu_gated, "gelu_tanh": _native.Epilogue.gelu_gated}
_GROUPS = (32, 64, 128)


class PackedWeight:
    """A weight [N, K] in its packed form, with its bias if it has one.

    Args:
        format: see the module's docstring.
        outputs: N; of gate and up together if `gated`.
        inputs: K.
        gated: the rows are those of a gate and then as many of an up projection, for `gated`.
        group: inputs per group; only for ``int4``.
        activations: ``int8`` or ``bf16``, for ``int8`` and ``int4``; see the module's docstring.
        tensors: ``data`` uint8, ``bias`` float32 if there is one, and by format ``scales`` float32, ``multipliers`` and
            ``offsets`` uint8, all flat, as `pack` makes them. They are used, not copied.

    Raises:
        ValueError: a tensor is missing, left over, or of a wrong size or type.
    """

    def __init__(
        self,
        format: Format,
        outputs: int,
        inputs: int,
        gated: bool,
        group: int,
        tensors: Mapping[str, Tensor],
        activations: str = "int8",
    ) -> None:
        self.format = format
        self.outputs = outputs
        self.inputs = inputs
        self.is_gated = gated
        self.group = group
        self.activations = activations
        self.tensors = dict(tensors)
        panels, depth = _padded(format, outputs, inputs, gated, group)
        sizes = _sizes(format, outputs, inputs, gated, group)
        needed = sizes.keys() - {"bias", "offsets"}
        found = {name: (tensor.numel(), tensor.dtype) for name, tensor in self.tensors.items()}
        if not (needed <= found.keys() and found.items() <= sizes.items()):
            raise ValueError(f"A weight {format} [{outputs}, {inputs}] is not made of {found}.")

        def address(name: str) -> int:
            return self.tensors[name].data_ptr() if name in self.tensors else 0

        self.native = _native.Weight(
            _FORMATS[format],
            outputs,
            inputs,
            gated,
            panels,
            depth,
            address("data"),
            address("scales"),
            address("bias"),
            group,
            address("multipliers"),
            address("offsets"),
            format != "bf16" and activations == "bf16",
        )

    def taking(self, activations: str) -> PackedWeight:
        """The same weight, sharing its memory, for activations rounded to ``int8`` or ``bf16``."""
        return PackedWeight(
            self.format, self.outputs, self.inputs, self.is_gated, self.group, self.tensors, activations
        )

    @property
    def nbytes(self) -> int:
        """Bytes that a use of the whole weight reads."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dequantize(self) -> Tensor:
        """The matrix that is computed with, [N, K] float32, without the bias."""
        out = torch.empty(self.outputs, self.inputs)
        self.native.unpack(out.data_ptr())
        return out

    def rows(self, indices: Tensor, scale: float = 1.0) -> Tensor:
        """Rows of a weight that is not gated, of those that `dequantize` gives.

        Args:
            indices: [T] int64, from 0 to N - 1.
            scale: rows are rounded to bfloat16, multiplied by it, and rounded again.

        Returns:
            [T, K] bfloat16, new memory.
        """
        indices = indices.contiguous()
        out = torch.empty(len(indices), self.inputs, dtype=torch.bfloat16)
        self.native.gather(indices.data_ptr(), len(indices), scale, out.data_ptr())
        return out

    def linear(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x[T, K] bfloat16 to x W^T + bias, [T, N] bfloat16, in `out` if given."""
        return self._run(x, _native.Epilogue.bf16, out, torch.bfloat16)

    def linear_f32(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x[T, K] bfloat16 to x W^T + bias, [T, N] float32, in `out` if given."""
        return self._run(x, _native.Epilogue.f32, out, torch.float32)

    def linear_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Adds x W^T + bias, x[T, K] bfloat16, to the residual [T, N] bfloat16 in place, rounded once. Returns it."""
        return self._run(x, _native.Epilogue.add_bf16, residual, torch.bfloat16)

    def gated(self, x: Tensor, activation: Activation, out: Tensor | None = None) -> Tensor:
        """x[T, K] bfloat16 to ``activation(gate) * up``, rounded once, [T, N/2] bfloat16, in `out` if given."""
        return self._run(x, _GATES[activation], out, torch.bfloat16)

    def _run(self, x: Tensor, epilogue: Any, out: Tensor | None, dtype: torch.dtype) -> Tensor:
        gates = epilogue in (_native.Epilogue.silu_gated, _native.Epilogue.gelu_gated)
        if gates != self.is_gated:
            raise ValueError("A gated weight is used by gated(), and only that.")
        if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != self.inputs:
            raise ValueError(f"x must be [T, {self.inputs}] bfloat16, not {list(x.shape)} {x.dtype}.")
        if x.stride(1) != 1:
            x = x.contiguous()
        shape = (x.shape[0], self.outputs // 2 if gates else self.outputs)
        if out is None:
            out = torch.empty(shape, dtype=dtype)
        elif out.shape != shape or out.dtype != dtype or (out.stride(1) != 1 and shape[1] > 1):
            raise ValueError(f"The output must be {list(shape)} {dtype} with its columns side by side.")
        self.native.linear(x.data_ptr(), x.stride(0), shape[0], epilogue, out.data_ptr(), out.stride(0))
        return out


def pack(
    weight: Tensor,
    format: Format,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    group: int = 32,
    symmetric: bool = False,
    importance: Tensor | None = None,
    activations: str = "int8",
) -> PackedWeight:
    """Rounds a weight to a format and packs it.

    Args:
        weight: [N, K] bfloat16 or float32.
        format: see the module's docstring.
        bias: [N] of any floating type.
        gated: the first N/2 rows are a gate's, the others those of up.
        group: inputs per group of ``int4``: 32, 64 or 128.
        symmetric: whether groups of ``int4`` do without offsets, for 0.25 bits less per weight in groups of 32.
        importance: [K] float32, not negative: what an error at each input counts when ``int4`` chooses ranges, for
            example the mean square of the activations. None counts all the same.
        activations: ``int8`` or ``bf16``, for ``int8`` and ``int4``; see the module's docstring.

    Raises:
        ValueError: for a shape, type or group that is not listed here.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"The weight must be [N, K] bfloat16 or float32, not {list(weight.shape)} {weight.dtype}.")
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    packed = _empty(format, weight.shape[0], weight.shape[1], bias, gated, group, symmetric)
    if importance is not None:
        padding = (0, _padded(format, packed.outputs, packed.inputs, gated, group)[1] - packed.inputs)
        importance = torch.nn.functional.pad(importance.float(), padding).contiguous()
    packed.native.pack(
        weight.data_ptr(),
        weight.dtype == torch.float32,
        weight.stride(0),
        0 if importance is None else importance.data_ptr(),
    )
    return packed.taking(activations)


def _padded(format: Format, outputs: int, inputs: int, gated: bool, group: int) -> tuple[int, int]:
    """Panels and inputs with padding."""
    panels = 2 * math.ceil(outputs // 2 / _PANEL) if gated else math.ceil(outputs / _PANEL)
    step = {"bf16": 2, "int8": 4, "int4": group}[format]
    return panels, math.ceil(inputs / step) * step


def _sizes(format: Format, outputs: int, inputs: int, gated: bool, group: int) -> dict[str, tuple[int, torch.dtype]]:
    """Elements and type of each tensor that a weight may have."""
    panels, depth = _padded(format, outputs, inputs, gated, group)
    rows = panels * _PANEL
    sizes = {
        "data": (rows * depth * {"bf16": 4, "int8": 2, "int4": 1}[format] // 2, torch.uint8),
        "bias": (rows, torch.float32),
    }
    if format != "bf16":
        sizes["scales"] = (rows, torch.float32)
    if format == "int4":
        sizes["multipliers"] = sizes["offsets"] = (rows * depth // group, torch.uint8)
    return sizes


def _empty(
    format: Format, outputs: int, inputs: int, bias: Tensor | None, gated: bool, group: int, symmetric: bool
) -> PackedWeight:
    """Memory for a weight, all zeros but for the bias."""
    if format == "int4" and group not in _GROUPS:
        raise ValueError(f"The group of int4 must be one of {_GROUPS}, not {group}.")
    if gated and outputs % 2:
        raise ValueError("A gated weight has an even number of rows.")
    sizes = _sizes(format, outputs, inputs, gated, group)
    left_out = {"bias"} | ({"offsets"} if symmetric else set())
    tensors = {name: zeros((size,), kind) for name, (size, kind) in sizes.items() if name not in left_out}
    if bias is not None:
        tensors["bias"] = _pad_bias(bias.float(), sizes["bias"][0], gated)
    return PackedWeight(format, outputs, inputs, gated, group, tensors)


def _pad_bias(bias: Tensor, rows: int, gated: bool) -> Tensor:
    """In the order of the panels."""
    parts = bias.chunk(2) if gated else (bias,)
    padded = [torch.nn.functional.pad(part, (0, rows // len(parts) - len(part))).view(-1, _PANEL) for part in parts]
    return torch.stack(padded, dim=1).flatten()
