"""What a decoder is, and every number that follows from it. No torch.

A `ModelSpec` describes one decoder-only transformer. The engine builds the model and sizes its memory with the
functions here, and a planner predicts with the same ones, so the two cannot disagree.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

from tokenmill.errors import ModelError
from tokenmill.models.rope import RopeSpec

__all__ = [
    "BLOCK_NORMS",
    "MAX_TOKENS",
    "AttentionSpec",
    "KVGroup",
    "KVLayout",
    "LayerSpec",
    "MlpSpec",
    "ModelSpec",
    "flops_per_token",
    "is_norm",
    "kv_bytes_per_token",
    "kv_layout",
    "kv_row_bytes",
    "parameters",
    "pool_blocks",
    "weight_bytes",
    "weight_shapes",
]

MAX_TOKENS = 2**31 - 1
"""Longest sequence that can be addressed at all: lengths are int32."""

KV_SCALE_BYTES = 4
"""A scale of quantized keys or values is a float32."""

NORM_BYTES = 4
"""Norm weights are kept in float32 whatever the model's type: they are few, and gemma's ``1 + w`` needs the bits."""


@dataclass(frozen=True)
class AttentionSpec:
    """Causal self-attention with grouped queries (arXiv 2305.13245)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    """Multiplies q·k."""
    rope: RopeSpec
    window: int | None = None
    """A token sees itself and the `window - 1` tokens before it; None sees all."""
    softcap: float | None = None
    """Scores s become ``softcap * tanh(s / softcap)``."""
    qkv_bias: bool = False
    out_bias: bool = False
    norm: Literal["none", "per_head", "whole"] = "none"
    """RMS norm of queries and keys before the rotation: of each head, or of the whole projection."""

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class MlpSpec:
    """Gated feed-forward layer (arXiv 2002.05202): ``down(activation(gate(x)) * up(x))``."""

    intermediate: int
    activation: Literal["silu", "gelu_tanh"] = "silu"
    bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One layer: how attention and feed-forward are joined to the residual stream is the kind of block."""

    attention: AttentionSpec
    mlp: MlpSpec
    block: Literal["pre_norm", "sandwich_norm", "post_norm"] = "pre_norm"


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer."""

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    max_position: int
    """Longest sequence the model is made for, in tokens."""
    tied_head: bool
    """The embedding is also the output projection."""
    embedding_scale: float = 1.0
    logit_softcap: float | None = None


BLOCK_NORMS = {
    "pre_norm": ("attention_norm", "mlp_norm"),
    "sandwich_norm": ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"),
    "post_norm": ("attention_post_norm", "mlp_post_norm"),
}
"""The norms of each kind of block, all of `hidden_size` weights."""


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model: our name and its shape.

    Linear weights are [out, in]; q, k, v are rows of one tensor in this order, and so are gate and up.
    """
    shapes: dict[str, tuple[int, ...]] = {"embedding": (spec.vocab_size, spec.hidden_size), "norm": (spec.hidden_size,)}
    if not spec.tied_head:
        shapes["head"] = (spec.vocab_size, spec.hidden_size)
    for index, layer in enumerate(spec.layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in _layer_shapes(layer, spec.hidden_size).items()}
    return shapes


def _layer_shapes(layer: LayerSpec, hidden: int) -> dict[str, tuple[int, ...]]:
    attention, mlp = layer.attention, layer.mlp
    qkv = attention.q_size + 2 * attention.kv_size
    shapes: dict[str, tuple[int, ...]] = {
        "attention.qkv": (qkv, hidden),
        "attention.out": (hidden, attention.q_size),
        "mlp.gate_up": (2 * mlp.intermediate, hidden),
        "mlp.down": (hidden, mlp.intermediate),
    }
    shapes |= dict.fromkeys(BLOCK_NORMS[layer.block], (hidden,))
    if attention.qkv_bias:
        shapes["attention.qkv_bias"] = (qkv,)
    if attention.out_bias:
        shapes["attention.out_bias"] = (hidden,)
    if attention.norm == "per_head":
        shapes |= {"attention.q_norm": (attention.head_dim,), "attention.k_norm": (attention.head_dim,)}
    if attention.norm == "whole":
        shapes |= {"attention.q_norm": (attention.q_size,), "attention.k_norm": (attention.kv_size,)}
    if mlp.bias:
        shapes |= {"mlp.gate_up_bias": (2 * mlp.intermediate,), "mlp.down_bias": (hidden,)}
    return shapes


def is_norm(name: str) -> bool:
    """Whether the tensor of this name (ours) is a norm's weight."""
    return name.endswith("norm")


def parameters(spec: ModelSpec) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(shape) for shape in weight_shapes(spec).values())


def weight_bytes(spec: ModelSpec, dtype_bytes: int) -> int:
    """Bytes of the weights in memory: `dtype_bytes` per parameter, `NORM_BYTES` per norm weight."""
    shapes = weight_shapes(spec).items()
    return sum(math.prod(shape) * (NORM_BYTES if is_norm(name) else dtype_bytes) for name, shape in shapes)


def flops_per_token(spec: ModelSpec, context: int) -> int:
    """Floating-point operations of the matrix products for one token that sees `context` tokens, itself included.

    Two per weight of every linear layer and of the head (a multiplication and an addition); the embedding is a lookup.
    Attention adds, per layer, ``2 * heads * head_dim`` for the scores and as much for the weighted sum, for each token
    within the window.
    """
    layer_weights = sum(
        math.prod(shape)
        for layer in spec.layers
        for shape in _layer_shapes(layer, spec.hidden_size).values()
        if len(shape) == 2
    )
    attention = sum(
        4 * layer.attention.q_size * min(context, layer.attention.window or context) for layer in spec.layers
    )
    return 2 * (layer_weights + spec.vocab_size * spec.hidden_size) + attention


def kv_row_bytes(head_dim: int, dtype_bytes: int, quantized: bool = False) -> int:
    """Bytes of the key, or the value, of one token and head: ``head_dim * bytes``, or quantized ``head_dim + 4``.

    Quantized are int8 elements with a float32 scale behind them (`kernels.whole_kv`), whatever the model's type.
    """
    return head_dim + KV_SCALE_BYTES if quantized else head_dim * dtype_bytes


def kv_bytes_per_token(spec: ModelSpec, dtype_bytes: int, quantized: bool = False) -> int:
    """Bytes of keys and values that one token leaves behind in all layers: ``sum(2 * kv_heads * row_bytes)``."""
    heads = (layer.attention for layer in spec.layers)
    return sum(2 * each.kv_heads * kv_row_bytes(each.head_dim, dtype_bytes, quantized) for each in heads)


@dataclass(frozen=True)
class KVGroup:
    """Layers that share one block table: they see the same tokens, so their blocks live and die together."""

    window: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True)
class KVLayout:
    """How keys and values of all layers share one pool of blocks; see `kv_layout`."""

    groups: tuple[KVGroup, ...]
    block_size: int
    """Tokens per block."""
    block_bytes: int
    """Bytes of one block id over all buffers."""
    kv_heads: int
    head_dim: int
    buffers: int
    """Physical tensors of keys (and as many of values); layer j of any group uses buffer j."""
    quantized: bool = False
    """Whether keys and values are int8 with a scale per token and head, see `kv_row_bytes`."""

    def blocks_for(self, tokens: int, chunk: int) -> int:
        """Most blocks that one sequence holds at a time when it grows to `tokens`, at most `chunk` tokens a step.

        A group without a window holds ``ceil(tokens / S)``. With a window W, a step of `chunk` tokens needs those
        tokens and the W - 1 before its first; they touch at most ``ceil((W - 1 + chunk) / S) + 1`` blocks, because
        they may begin anywhere within a block.
        """
        size = self.block_size
        whole = -(-tokens // size)
        return sum(
            whole if group.window is None else min(whole, -(-(group.window - 1 + chunk) // size) + 1)
            for group in self.groups
        )

    def capacity(self, blocks: int, chunk: int) -> int:
        """Longest sequence, in tokens, that fits into `blocks` blocks at `chunk` tokens a step.

        `MAX_TOKENS` when every group has a window and the blocks hold all windows: nothing then grows with the length.
        """
        if self.blocks_for(MAX_TOKENS, chunk) <= blocks:
            return MAX_TOKENS
        # Never decreasing in the length, so the first length that needs more is found by bisection.
        return bisect_right(range(MAX_TOKENS), blocks, key=lambda tokens: self.blocks_for(tokens, chunk)) - 1


def kv_layout(spec: ModelSpec, block_size: int, dtype_bytes: int, quantized: bool = False) -> KVLayout:
    """How the layers of `spec` share one pool of blocks of `block_size` tokens.

    Keys and values are elements of `dtype_bytes`, or `quantized` to int8.

    Layers with the same window form a kind. So that all kinds draw from one pool, each kind is cut into groups of
    ``buffers`` layers, where ``buffers`` is the number of layers of the smallest kind; each group has its own block
    table, and a block id indexes any of the ``buffers`` physical tensors. Hence one size of block for every group:

        block_bytes = buffers * 2 * block_size * kv_heads * row_bytes

    with ``row_bytes`` of `kv_row_bytes`. A model with one kind of layer has one group and one buffer per layer.
    gemma3's 22 layers with a window and 4 without make 4 buffers and 6 + 1 groups, the last group with a window leaving
    two buffers of its blocks unused.

    Raises:
        ModelError: ``unsupported_model`` when layers differ in key heads or head size.
    """
    shapes = {(layer.attention.kv_heads, layer.attention.head_dim) for layer in spec.layers}
    if len(shapes) != 1:
        raise ModelError(
            "unsupported_model", "Layers with different numbers of key heads or head sizes cannot share a block pool."
        )
    ((kv_heads, head_dim),) = shapes
    kinds: dict[int | None, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        kinds.setdefault(layer.attention.window, []).append(index)
    buffers = min(len(layers) for layers in kinds.values())
    groups = tuple(
        KVGroup(window, tuple(layers[start : start + buffers]))
        for window, layers in kinds.items()
        for start in range(0, len(layers), buffers)
    )
    block_bytes = buffers * 2 * block_size * kv_heads * kv_row_bytes(head_dim, dtype_bytes, quantized)
    return KVLayout(groups, block_size, block_bytes, kv_heads, head_dim, buffers, quantized)


def pool_blocks(layout: KVLayout, budget_bytes: int) -> int:
    """Blocks that fit into `budget_bytes`."""
    return max(0, budget_bytes // layout.block_bytes)
