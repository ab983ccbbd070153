"""Qwen3 (arXiv 2505.09388): Llama with a norm on each head of q and k, and a head size of its own."""

from dataclasses import replace

from tokenmill.models.family import (
    ATTENTION_BIAS,
    DENSE,
    PRE_NORM,
    QK_NORM,
    Config,
    Family,
    attention,
    dense,
    mlp,
    windows,
)
from tokenmill.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    config = {"head_dim": 128, **config}
    bias = bool(config.get("attention_bias", False))
    sliding = bool(config.get("use_sliding_window", False))
    first = int(config.get("max_window_layers", 28))
    base, feed_forward = attention(config, qkv_bias=bias, out_bias=bias, norm="per_head"), mlp(config)
    return dense(
        config,
        tuple(
            LayerSpec(replace(base, window=window), feed_forward)
            for window in windows(config, lambda index: sliding and index >= first)
        ),
    )


FAMILY = Family(spec, {**DENSE, **PRE_NORM, **QK_NORM, **ATTENTION_BIAS})
