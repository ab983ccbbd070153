"""Whole-number weights in the memory order of the native kernels.

Needs the native module. `kernels.cpu.packed` packs weights that it rounds itself; here are those that are rounded
already, by a checkpoint or by a format of `quant.formats`, with every whole number kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.kernels.cpu.packed import PackedWeight
from tokenmill.quant.weight import Quantized

__all__ = ["packed"]

_PANEL = 32
"""Outputs that lie together."""

_BYTES = [1, 0, 3, 2]
"""Of four bytes of 4-bit numbers, which hold the inputs 0 to 3 of eight in the low half and 4 to 7 in the high one."""


def packed(weight: Quantized, bias: Tensor | None = None, *, gated: bool = False) -> PackedWeight:
    """A weight [N, K] for the native kernels, which compute with ``weight.dequantize()`` exactly.

    Args:
        bias: [N], any float type.
        gated: the first N/2 rows are a gate's and the others those of up.
    """
    tensors = {"scales": _panels(weight.scales, gated).flatten()}
    if bias is not None:
        tensors["bias"] = _panels(bias.float(), gated).flatten()
    if weight.multipliers is None:
        filled = F.pad(weight.q, (0, -weight.inputs % 4))
        quads = torch.unflatten(_panels(filled, gated), 2, (-1, 4)).transpose(1, 2)
        tensors["data"] = (quads.to(torch.int16) + 128).byte().flatten()
    else:
        for name, each in (("multipliers", weight.multipliers), ("offsets", weight.offsets)):
            if each is not None:
                tensors[name] = _panels(each, gated).transpose(1, 2).flatten()
        eights = torch.unflatten(_panels(weight.digits(), gated), 2, (-1, 8)).transpose(1, 2)
        low, high = eights[..., :4][..., _BYTES], eights[..., 4:][..., _BYTES]
        tensors["data"] = (low | high << 4).flatten()
    return PackedWeight("int4" if weight.group else "int8", *weight.shape, gated, weight.group or _PANEL, tensors)


def _panels(rows: Tensor, gated: bool) -> Tensor:
    """[N, ...] to [panels, 32, ...], filled up with zeros; panels of gate and up take turns if gated."""
    parts = rows.chunk(2) if gated else (rows,)
    short = -parts[0].shape[0] % _PANEL
    filled = [torch.cat((part, part.new_zeros(short, *part.shape[1:]))) for part in parts]
    return torch.stack([torch.unflatten(part, 0, (-1, _PANEL)) for part in filled], dim=1).flatten(0, 1)
