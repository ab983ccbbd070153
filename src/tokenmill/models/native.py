"""Builds the native layers from a model's description and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from tokenmill.layers.native import (
    AttentionInput,
    Format,
    MlpInput,
    NativeAttention,
    NativeBlock,
    NativeHead,
    PackedWeight,
    add,
    add_normed,
    pack,
)
from tokenmill.models.spec import LayerSpec, ModelSpec
from tokenmill.quant import panels
from tokenmill.quant.weight import Quantized

__all__ = ["native_block", "native_head", "packed"]


def packed(name: str, weight: Tensor | Quantized, bias: Tensor | None, quantize: str, activations: str) -> PackedWeight:
    """A matrix of the model in the memory order of the kernels.

    Args:
        name: as `spec.weight_shapes` names it.
        weight: kept exactly if it is quantized already.
        quantize: what it is rounded to if not: ``int8``, ``int4``, or ``none`` for bfloat16.
        activations: one of `quant.scheme.ACTIVATIONS`, unless it is bfloat16.
    """
    gated = name.endswith("mlp.gate_up")
    if isinstance(weight, Quantized):
        made = panels.packed(weight, bias, gated=gated)
    else:
        made = pack(weight, "bf16" if quantize == "none" else cast(Format, quantize), bias, gated=gated)
    return made.taking(activations)


def native_block(layer: LayerSpec, own: Mapping[str, Any], eps: float) -> NativeBlock:
    """One layer.

    Args:
        own: its weights, named as in `spec.weight_shapes` without their prefix; matrices `packed`.
    """
    attention, mlp = layer.attention, layer.mlp
    prepare = AttentionInput(
        own.get("attention_norm"),
        eps,
        own["attention.qkv"],
        attention.norm,
        own.get("attention.q_norm"),
        own.get("attention.k_norm"),
        attention.heads,
        attention.head_dim,
        attention.rope.dim,
    )
    backs = [add_normed(own[name], eps) if name in own else add for name in ("attention_post_norm", "mlp_post_norm")]
    return NativeBlock(
        NativeAttention(prepare, attention.scale, attention.window, attention.softcap),
        own["attention.out"],
        backs[0],
        MlpInput(own.get("mlp_norm"), eps, own["mlp.gate_up"], mlp.activation),
        own["mlp.down"],
        backs[1],
    )


def native_head(spec: ModelSpec, norm: Tensor, weight: PackedWeight) -> NativeHead:
    """The last norm and the projection onto the vocabulary; `weight` [V, H] may be the embedding."""
    return NativeHead(norm, spec.norm_eps, weight, spec.logit_softcap)
