"""The decoder: layers built from a description, run over a paged cache.

How attention and feed-forward are joined to the residual stream is the kind of block; each kind is a class. Objects
here are plain holders of tensors: a forward pass is a few calls per layer, or on the native kernels one call for all
layers, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenmill.kernels.probe import native_isa
from tokenmill.layers.attention import Attention, HeadNorm, KVView, NoNorm, QKNorm, WholeNorm
from tokenmill.layers.embedding import Embedding, LogitsHead, QuantizedEmbedding
from tokenmill.layers.linear import Linear
from tokenmill.layers.mlp import ACTIVATIONS, GatedMLP
from tokenmill.layers.norm import RMSNorm
from tokenmill.layers.rotary import Rotary
from tokenmill.models.batch import Angles, ForwardBatch, KVCache
from tokenmill.models.rope import RopeSpec
from tokenmill.models.spec import BLOCK_NORMS, AttentionSpec, KVLayout, LayerSpec, ModelSpec
from tokenmill.quant.weight import Quantized

__all__ = ["Decoder", "PlainStack", "PostNormBlock", "PreNormBlock", "SandwichNormBlock", "plain_block", "usable"]


@dataclass(frozen=True)
class PreNormBlock:
    """``x += attention(norm(x)); x += mlp(norm(x))`` (arXiv 2002.04745)."""

    attention: Attention
    mlp: GatedMLP
    attention_norm: RMSNorm
    mlp_norm: RMSNorm

    def __call__(self, x: Tensor, angles: Angles, kv: KVView) -> Tensor:
        x = x.add_(self.attention(self.attention_norm(x), angles, kv))
        return x.add_(self.mlp(self.mlp_norm(x)))


@dataclass(frozen=True)
class SandwichNormBlock:
    """``x += norm(attention(norm(x))); x += norm(mlp(norm(x)))`` (Gemma 2, arXiv 2408.00118)."""

    attention: Attention
    mlp: GatedMLP
    attention_norm: RMSNorm
    attention_post_norm: RMSNorm
    mlp_norm: RMSNorm
    mlp_post_norm: RMSNorm

    def __call__(self, x: Tensor, angles: Angles, kv: KVView) -> Tensor:
        x = x.add_(self.attention_post_norm(self.attention(self.attention_norm(x), angles, kv)))
        return x.add_(self.mlp_post_norm(self.mlp(self.mlp_norm(x))))


@dataclass(frozen=True)
class PostNormBlock:
    """``x += norm(attention(x)); x += norm(mlp(x))`` (OLMo 2, arXiv 2501.00656)."""

    attention: Attention
    mlp: GatedMLP
    attention_post_norm: RMSNorm
    mlp_post_norm: RMSNorm

    def __call__(self, x: Tensor, angles: Angles, kv: KVView) -> Tensor:
        x = x.add_(self.attention_post_norm(self.attention(x, angles, kv)))
        return x.add_(self.mlp_post_norm(self.mlp(x)))


Block = PreNormBlock | SandwichNormBlock | PostNormBlock
BLOCKS: Mapping[str, Callable[..., Block]] = {
    "pre_norm": PreNormBlock,
    "sandwich_norm": SandwichNormBlock,
    "post_norm": PostNormBlock,
}
"""By `LayerSpec.block`; besides attention and mlp each takes the norms that `spec.BLOCK_NORMS` names."""
QK_NORMS: Mapping[str, Callable[[RMSNorm, RMSNorm], QKNorm]] = {"per_head": HeadNorm, "whole": WholeNorm}


def plain_block(layer: LayerSpec, own: Mapping[str, Any], eps: float) -> Block:
    """One layer over the plain operators; its weights are named as in `spec.weight_shapes` without their prefix."""
    mlp = GatedMLP(
        Linear(own["mlp.gate_up"], own.get("mlp.gate_up_bias")),
        Linear(own["mlp.down"], own.get("mlp.down_bias")),
        ACTIVATIONS[layer.mlp.activation],
    )
    norms = {name: RMSNorm(own[name], eps) for name in BLOCK_NORMS[layer.block]}
    return BLOCKS[layer.block](attention=_attention(layer.attention, own, eps), mlp=mlp, **norms)


def _attention(spec: AttentionSpec, own: Mapping[str, Any], eps: float) -> Attention:
    norm: QKNorm = NoNorm()
    if spec.norm != "none":
        q, k = (RMSNorm(own[f"attention.{name}"], eps) for name in ("q_norm", "k_norm"))
        norm = QK_NORMS[spec.norm](q, k)
    return Attention(
        Linear(own["attention.qkv"], own.get("attention.qkv_bias")),
        Linear(own["attention.out"], own.get("attention.out_bias")),
        norm,
        [spec.q_size, spec.kv_size, spec.kv_size],
        spec.head_dim,
        spec.scale,
        spec.window,
        spec.softcap,
    )


def _own(index: int, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of one layer."""
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}


class Layers(Protocol):
    """All layers of a model."""

    def __call__(self, x: Tensor, angles: Sequence[Angles], batch: ForwardBatch, cache: KVCache) -> Tensor:
        """The residual stream [T, H] behind the last layer; x may be changed. Writes the tokens' KV to `cache`.

        Args:
            angles: by rope.
        """


@dataclass(frozen=True)
class PlainStack:
    """Layers over the plain operators, with the number of the angles that each rotates by."""

    blocks: Sequence[Block]
    ropes: Sequence[int]

    def __call__(self, x: Tensor, angles: Sequence[Angles], batch: ForwardBatch, cache: KVCache) -> Tensor:
        for index, (block, rope) in enumerate(zip(self.blocks, self.ropes, strict=True)):
            keys, values, group = cache.layer(index)
            kv = KVView(
                keys, values, batch.slots[group], batch.block_tables[group], batch.query_start, batch.context_lens
            )
            x = block(x, angles[rope], kv)
        return x


def usable(spec: ModelSpec, dtype: torch.dtype, device: torch.device, block_size: int) -> bool:
    """Whether a model can run on the native CPU kernels: they are built, and made for its type and sizes."""
    if device.type != "cpu" or not block_size or native_isa() is None:
        return False
    from tokenmill.layers.native import serves

    return all(serves(dtype, block_size, layer.attention.head_dim) for layer in spec.layers)


class Decoder:
    """A model, ready to run.

    Args:
        spec: what it is.
        weights: every tensor that `spec.weight_shapes` names, on one device: norms in float32, all others in `dtype`
            or, matrices, quantized (`quant.weight.Quantized`). For native layers every matrix is packed with its bias
            (`models.native.packed`). They are used, not copied.
        dtype: of activations and KV.
        native: whether layers are those over the native CPU kernels. See `usable` for when there is a choice.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Any], dtype: torch.dtype, native: bool = False) -> None:
        self.spec = spec
        self.native = native
        self.dtype = dtype
        self.device = weights["norm"].device
        self.weight_bytes = sum(int(weight.nbytes) for weight in weights.values())
        """Bytes of memory that the weights take."""
        table = weights["embedding"]
        head = table if spec.tied_head else weights["head"]
        scale = torch.tensor(spec.embedding_scale, dtype=self.dtype, device=self.device)
        layers = [(layer, _own(index, weights)) for index, layer in enumerate(spec.layers)]
        # Layers that rotate alike share the angles, which are computed once per forward pass.
        ropes: list[RopeSpec] = list(dict.fromkeys(layer.attention.rope for layer in spec.layers))
        rope_of = [ropes.index(layer.attention.rope) for layer in spec.layers]
        self._rotaries = [
            Rotary(rope.frequencies(spec.max_position), rope.attention_factor, self.device) for rope in ropes
        ]
        self._embedding: Callable[[Tensor], Tensor]
        self._layers: Layers
        self._norm: Callable[[Tensor], Tensor]
        self._head: Callable[[Tensor], Tensor]
        if native:
            from tokenmill.layers.native import NativeEmbedding
            from tokenmill.models.native import NativeStack, native_head, native_layer

            end = native_head(spec, weights["norm"], head)
            self._embedding, self._norm, self._head = NativeEmbedding(table, scale.item()), end.normed, end
            self._layers = NativeStack(
                [
                    native_layer(layer, own, spec.norm_eps, rope)
                    for (layer, own), rope in zip(layers, rope_of, strict=True)
                ]
            )
        else:
            quantized = isinstance(table, Quantized)
            self._embedding = QuantizedEmbedding(table, scale) if quantized else Embedding(table, scale)
            self._norm = RMSNorm(weights["norm"], spec.norm_eps)
            self._head = LogitsHead(Linear(head), spec.logit_softcap)
            self._layers = PlainStack([plain_block(layer, own, spec.norm_eps) for layer, own in layers], rope_of)

    def new_cache(self, layout: KVLayout, num_blocks: int) -> KVCache:
        """An empty cache on the model's device, of its type or quantized; `layout` is made for this model's spec."""
        return KVCache(layout, num_blocks, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Hidden states after the last norm, [T, hidden_size] in the model's type. Writes the tokens' KV to `cache`."""
        angles = [rotary(batch.positions) for rotary in self._rotaries]
        return self._norm(self._layers(self._embedding(batch.token_ids), angles, batch, cache))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens of the vocabulary, [n, vocab_size] float32, from hidden states [n, hidden_size]."""
        return self._head(hidden)
