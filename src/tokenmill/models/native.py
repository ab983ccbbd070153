"""Builds the native layers from a model's description and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from tokenmill.layers.native import (
    AttentionInput,
    Format,
    Layer,
    MlpInput,
    NativeHead,
    PackedCache,
    PackedWeight,
    Stack,
    WayBack,
    pack,
)
from tokenmill.models.batch import Angles, ForwardBatch, KVCache
from tokenmill.models.spec import LayerSpec, ModelSpec
from tokenmill.quant import panels
from tokenmill.quant.weight import Quantized

__all__ = ["NativeStack", "native_head", "native_layer", "packed"]


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


def native_layer(layer: LayerSpec, own: Mapping[str, Any], eps: float, rope: int) -> Layer:
    """One layer.

    Args:
        own: its weights, named as in `spec.weight_shapes` without their prefix; matrices `packed`.
        rope: which of the model's angles it rotates by.
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
    return Layer(
        prepare,
        attention.scale,
        attention.window,
        attention.softcap,
        WayBack(own["attention.out"], own.get("attention_post_norm"), eps),
        MlpInput(own.get("mlp_norm"), eps, own["mlp.gate_up"], mlp.activation),
        WayBack(own["mlp.down"], own.get("mlp_post_norm"), eps),
        rope,
    )


class NativeStack:
    """All layers of a model, as `decoder.PlainStack` is."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self._cache: KVCache | None = None
        self._stack: Stack

    def __call__(self, x: Tensor, angles: Sequence[Angles], batch: ForwardBatch, cache: KVCache) -> Tensor:
        """The residual stream [T, H], changed in place. Writes the tokens' keys and values into the cache."""
        if cache is not self._cache:  # once: a model keeps its cache
            keys, values, groups = zip(*map(cache.layer, range(len(self.layers))), strict=True)
            self._stack = Stack(self.layers, [*map(PackedCache, keys, values)], groups)
            self._cache = cache
        return self._stack(x, angles, batch.slots, batch.block_tables, batch.query_start, batch.context_lens)

    @property
    def seconds(self) -> dict[str, float]:
        """What the parts of all layers have taken since the cache came."""
        return self._stack.seconds


def native_head(spec: ModelSpec, norm: Tensor, weight: PackedWeight) -> NativeHead:
    """The last norm and the projection onto the vocabulary; `weight` [V, H] may be the embedding."""
    return NativeHead(norm, spec.norm_eps, weight, spec.logit_softcap)
