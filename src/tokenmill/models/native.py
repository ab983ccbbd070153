"""Builds the native layers from a model's description and weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tokenmill.layers.native import (
    AttentionInput,
    Format,
    MlpInput,
    NativeAttention,
    NativeBlock,
    NativeHead,
    add,
    add_normed,
    pack,
)
from tokenmill.models.spec import LayerSpec, ModelSpec

__all__ = ["native_block", "native_head"]


def native_block(layer: LayerSpec, own: Mapping[str, Tensor], eps: float, format: Format) -> NativeBlock:
    """One layer; its weights, named as in `spec.weight_shapes` without their prefix, are packed and not kept."""
    attention, mlp = layer.attention, layer.mlp
    prepare = AttentionInput(
        own.get("attention_norm"),
        eps,
        pack(own["attention.qkv"], format, own.get("attention.qkv_bias")),
        attention.norm,
        own.get("attention.q_norm"),
        own.get("attention.k_norm"),
        attention.heads,
        attention.head_dim,
        attention.rope.dim,
    )
    gate_up = pack(own["mlp.gate_up"], format, own.get("mlp.gate_up_bias"), gated=True)
    backs = [add_normed(own[name], eps) if name in own else add for name in ("attention_post_norm", "mlp_post_norm")]
    return NativeBlock(
        NativeAttention(prepare, attention.scale, attention.window, attention.softcap),
        pack(own["attention.out"], format, own.get("attention.out_bias")),
        backs[0],
        MlpInput(own.get("mlp_norm"), eps, gate_up, mlp.activation),
        pack(own["mlp.down"], format, own.get("mlp.down_bias")),
        backs[1],
    )


def native_head(spec: ModelSpec, norm: Tensor, weight: Tensor, format: Format) -> NativeHead:
    """The last norm and the projection onto the vocabulary; `weight` [V, H] may be the embedding."""
    return NativeHead(norm, spec.norm_eps, pack(weight, format), spec.logit_softcap)
