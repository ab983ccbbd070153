"""Writing weights the way compressed-tensors stores them: its tensors and its ``quantization_config``.

Source: https://github.com/vllm-project/compressed-tensors, formats int-quantized and pack-quantized, whose tensors
`quant.checkpoint` describes and reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.quant.method import Rounded
from tokenmill.quant.scheme import Scheme

__all__ = ["description", "tensors"]


def tensors(rounded: Rounded, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of a linear layer, by the last part of their names."""
    scales = rounded.scales.bfloat16()  # which holds them exactly
    if scheme.layout == "int-quantized":
        return {"weight": rounded.q, "weight_scale": scales}
    return {
        "weight_packed": _pack(rounded.q, scheme.bits),
        "weight_scale": scales,
        "weight_zero_point": _pack(rounded.zeros.T, scheme.bits).T.contiguous(),
        "weight_shape": torch.tensor(rounded.q.shape),
    }


def _pack(numbers: Tensor, bits: int) -> Tensor:
    """[R, C] int8 of `bits` bits to [R, ceil(C * bits / 32)] int32: shifted to start at 0, the first in the lowest."""
    fields = 32 // bits
    raised = F.pad(numbers.int() + (1 << (bits - 1)), (0, -numbers.shape[1] % fields))
    shifted: Tensor = torch.unflatten(raised, 1, (-1, fields)) << torch.arange(0, 32, bits, dtype=torch.int32)
    return shifted.sum(-1, dtype=torch.int32)


def description(scheme: Scheme, ignored: Sequence[str]) -> dict[str, Any]:
    """The section ``quantization_config`` of ``config.json`` for linear layers stored by `scheme`.

    Args:
        ignored: names of the linear layers that are not quantized.
    """
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group or None,
        "dynamic": False,
    }
    # Weights of 8 bits are multiplied in 8 bits, so the activations are rounded too, each token by itself.
    each_token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    activations = each_token if scheme.layout == "int-quantized" else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": scheme.layout,
        "ignore": list(ignored),
        "config_groups": {"group_0": group},
    }
