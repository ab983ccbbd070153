"""What a family file says, and the words it says it with. No torch.

A family is two things: a function from Hugging Face's ``config.json`` to a `ModelSpec`, and a map from the names of its
checkpoint's tensors to ours. The functions below read what most configurations have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenmill.errors import ModelError
from tokenmill.models.rope import Linear, Llama3, LongRope, RopeScaling, RopeSpec, Unscaled, Yarn
from tokenmill.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec
from tokenmill.registry import Registry

__all__ = [
    "ATTENTION_BIAS",
    "COMMON",
    "DENSE",
    "FAMILIES",
    "MLP_BIAS",
    "POST_NORM",
    "PRE_NORM",
    "QK_NORM",
    "SANDWICH_NORM",
    "Config",
    "Family",
    "Into",
    "WeightMap",
    "attention",
    "dense",
    "head_dim",
    "mlp",
    "offset_norms",
    "repeat",
    "require",
    "rope",
    "unsupported",
    "windows",
]

Config = Mapping[str, Any]
"""A parsed ``config.json``."""


@dataclass(frozen=True)
class Into:
    """Where a tensor of a checkpoint goes."""

    target: str
    """Our name (`spec.weight_shapes`); ``{}`` stands for the layer's index."""
    part: Literal["", "q", "k", "v", "gate", "up"] = ""
    """Which rows of a fused tensor it fills; all of it by default."""
    offset: float = 0.0
    """Added in float32: gemma stores a norm's weight as its distance from one."""


WeightMap = Mapping[str, Into | None]
"""From a checkpoint's tensor name, ``{}`` standing for the layer's index, to ours; None is known and not needed."""


@dataclass(frozen=True)
class Family:
    """One model family, as a file of `families/` defines it."""

    spec: Callable[[Config], ModelSpec]
    weights: WeightMap


FAMILIES: Registry[Family] = Registry("tokenmill.models.families", "families", "FAMILY")

_LAYER = "model.layers.{}."

COMMON: WeightMap = {
    "model.embed_tokens.weight": Into("embedding"),
    "model.norm.weight": Into("norm"),
    "lm_head.weight": Into("head"),
    _LAYER + "self_attn.o_proj.weight": Into("layers.{}.attention.out"),
    _LAYER + "self_attn.rotary_emb.inv_freq": None,  # early Llama checkpoints carry it; the spec already says it
    _LAYER + "mlp.down_proj.weight": Into("layers.{}.mlp.down"),
}
"""Embedding, head, last norm and outer projections, under the names that nearly all families use."""

DENSE: WeightMap = {
    **COMMON,
    _LAYER + "self_attn.q_proj.weight": Into("layers.{}.attention.qkv", "q"),
    _LAYER + "self_attn.k_proj.weight": Into("layers.{}.attention.qkv", "k"),
    _LAYER + "self_attn.v_proj.weight": Into("layers.{}.attention.qkv", "v"),
    _LAYER + "mlp.gate_proj.weight": Into("layers.{}.mlp.gate_up", "gate"),
    _LAYER + "mlp.up_proj.weight": Into("layers.{}.mlp.gate_up", "up"),
}
"""The same, and the inner projections one by one."""

PRE_NORM: WeightMap = {
    _LAYER + "input_layernorm.weight": Into("layers.{}.attention_norm"),
    _LAYER + "post_attention_layernorm.weight": Into("layers.{}.mlp_norm"),
}

SANDWICH_NORM: WeightMap = {
    _LAYER + "input_layernorm.weight": Into("layers.{}.attention_norm"),
    _LAYER + "post_attention_layernorm.weight": Into("layers.{}.attention_post_norm"),
    _LAYER + "pre_feedforward_layernorm.weight": Into("layers.{}.mlp_norm"),
    _LAYER + "post_feedforward_layernorm.weight": Into("layers.{}.mlp_post_norm"),
}

POST_NORM: WeightMap = {
    _LAYER + "post_attention_layernorm.weight": Into("layers.{}.attention_post_norm"),
    _LAYER + "post_feedforward_layernorm.weight": Into("layers.{}.mlp_post_norm"),
}

QK_NORM: WeightMap = {
    _LAYER + "self_attn.q_norm.weight": Into("layers.{}.attention.q_norm"),
    _LAYER + "self_attn.k_norm.weight": Into("layers.{}.attention.k_norm"),
}

ATTENTION_BIAS: WeightMap = {
    _LAYER + "self_attn.q_proj.bias": Into("layers.{}.attention.qkv_bias", "q"),
    _LAYER + "self_attn.k_proj.bias": Into("layers.{}.attention.qkv_bias", "k"),
    _LAYER + "self_attn.v_proj.bias": Into("layers.{}.attention.qkv_bias", "v"),
    _LAYER + "self_attn.o_proj.bias": Into("layers.{}.attention.out_bias"),
}

MLP_BIAS: WeightMap = {
    _LAYER + "mlp.gate_proj.bias": Into("layers.{}.mlp.gate_up_bias", "gate"),
    _LAYER + "mlp.up_proj.bias": Into("layers.{}.mlp.gate_up_bias", "up"),
    _LAYER + "mlp.down_proj.bias": Into("layers.{}.mlp.down_bias"),
}


def offset_norms(weights: WeightMap, offset: float) -> WeightMap:
    """The same map with `offset` added to every norm's weight."""
    return {
        name: Into(into.target, into.part, offset) if into is not None and into.target.endswith("norm") else into
        for name, into in weights.items()
    }


def unsupported(reason: str, field: str | None = None) -> ModelError:
    """The error for a checkpoint that asks for something that does not exist here."""
    return ModelError("unsupported_model", f"This checkpoint cannot be run: {reason}.", field)


def require(config: Config, key: str) -> Any:
    """A value that every configuration of the family must have.

    Raises:
        ModelError: ``checkpoint_mismatch`` naming the key.
    """
    if config.get(key) is None:
        raise ModelError("checkpoint_mismatch", f"config.json has no {key!r}.", key)
    return config[key]


def head_dim(config: Config) -> int:
    """``head_dim``, or the hidden size divided over the heads."""
    return int(config.get("head_dim") or require(config, "hidden_size") // require(config, "num_attention_heads"))


def rope(config: Config, *, theta: float = 10000.0, layer_type: str | None = None) -> RopeSpec:
    """The rotary embedding, from ``rope_parameters`` or from the older ``rope_theta`` and ``rope_scaling``.

    Args:
        theta: the base when the configuration names none.
        layer_type: the key below ``rope_parameters`` for families whose layers differ.

    Raises:
        ModelError: ``unsupported_model`` for an unknown kind of scaling, ``checkpoint_mismatch`` for a missing factor.
    """
    values: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if layer_type is not None and layer_type in values:
        values = values[layer_type]
    fraction = values.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    dim = int(head_dim(config) * fraction)
    base = float(values.get("rope_theta") or config.get("rope_theta") or theta)
    spec = RopeSpec(base, dim, _scaling(config, values))
    if isinstance(spec.scaling, LongRope) and {len(spec.scaling.short_factor), len(spec.scaling.long_factor)} != {
        dim // 2
    }:
        raise unsupported(f"its longrope lists must have {dim // 2} factors each", "rope_scaling")
    return spec


def _scaling(config: Config, values: Config) -> RopeScaling:
    kind = values.get("rope_type") or values.get("type") or "default"
    trained = int(
        config.get("original_max_position_embeddings")
        or values.get("original_max_position_embeddings")
        or require(config, "max_position_embeddings")
    )
    match kind:
        case "default":
            return Unscaled()
        case "linear":
            return Linear(float(require(values, "factor")))
        case "llama3":
            low, high = float(require(values, "low_freq_factor")), float(require(values, "high_freq_factor"))
            return Llama3(float(require(values, "factor")), low, high, trained)
        case "yarn":
            return _yarn(config, values, trained)
        case "longrope" | "su":
            factor = float(values.get("factor") or require(config, "max_position_embeddings") / trained)
            default = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
            sharpness = float(values.get("attention_factor") or default)
            return LongRope(
                tuple(require(values, "short_factor")), tuple(require(values, "long_factor")), trained, sharpness
            )
        case _:
            raise unsupported(f"rope type {kind!r} is unknown", "rope_scaling")


def _yarn(config: Config, values: Config, trained: int) -> Yarn:
    factor = float(values.get("factor") or require(config, "max_position_embeddings") / trained)

    def sharpness(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = values.get("mscale"), values.get("mscale_all_dim")
    default = sharpness(mscale) / sharpness(mscale_all) if mscale and mscale_all else sharpness(1.0)
    return Yarn(
        factor,
        trained,
        float(values.get("attention_factor") or default),
        float(values.get("beta_fast") or 32.0),
        float(values.get("beta_slow") or 1.0),
        bool(values.get("truncate", True)),
    )


def windows(config: Config, sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of each layer: as ``layer_types`` says, else `sliding_window` in the layers that `sliding` picks."""
    count = require(config, "num_hidden_layers")
    types = config.get("layer_types") or [
        "sliding_attention" if config.get("sliding_window") and sliding(index) else "full_attention"
        for index in range(count)
    ]
    for kind in types:
        if kind not in ("sliding_attention", "full_attention"):
            raise unsupported(f"layers of type {kind!r} are unknown", "layer_types")
    if len(types) != count:
        raise ModelError(
            "checkpoint_mismatch", f"config.json has {count} layers but {len(types)} layer_types.", "layer_types"
        )
    return tuple(int(require(config, "sliding_window")) if kind == "sliding_attention" else None for kind in types)


def attention(config: Config, **more: Any) -> AttentionSpec:
    """Attention with what `config` commonly says; `more` overrides."""
    heads, dim = int(require(config, "num_attention_heads")), head_dim(config)
    said: dict[str, Any] = {
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": dim,
    }
    said |= {"scale": dim**-0.5} | more
    if "rope" not in said:
        said["rope"] = rope(config)
    if said["heads"] % said["kv_heads"]:
        raise unsupported(f"{said['heads']} heads cannot share {said['kv_heads']} key heads", "num_key_value_heads")
    return AttentionSpec(**said)


def mlp(config: Config, *, bias: bool = False) -> MlpSpec:
    """The gated feed-forward layer."""
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    kinds: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in kinds:
        raise unsupported(f"activation {name!r} is unknown", "hidden_act")
    return MlpSpec(int(require(config, "intermediate_size")), kinds[name], bias)


def repeat(config: Config, layer: LayerSpec) -> tuple[LayerSpec, ...]:
    """As many of the same layer as `config` says."""
    return (layer,) * int(require(config, "num_hidden_layers"))


def dense(config: Config, layers: tuple[LayerSpec, ...], **more: Any) -> ModelSpec:
    """A model made of `layers` with what `config` commonly says; `more` overrides."""
    said: dict[str, Any] = {
        "model_type": require(config, "model_type"),
        "vocab_size": int(require(config, "vocab_size")),
        "hidden_size": int(require(config, "hidden_size")),
        "norm_eps": float(config.get("rms_norm_eps") or 1e-6),
        "max_position": int(require(config, "max_position_embeddings")),
        "tied_head": bool(config.get("tie_word_embeddings", False)),
    }
    return ModelSpec(layers=layers, **(said | more))
