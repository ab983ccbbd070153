"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama with biases on q, k and v."""

from dataclasses import replace

from tokenmill.models.family import ATTENTION_BIAS, DENSE, PRE_NORM, Config, Family, attention, dense, mlp, windows
from tokenmill.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    sliding = bool(config.get("use_sliding_window", False))
    first = int(config.get("max_window_layers", 28))
    base, feed_forward = attention(config, qkv_bias=True), mlp(config)
    return dense(
        config,
        tuple(
            LayerSpec(replace(base, window=window), feed_forward)
            for window in windows(config, lambda index: sliding and index >= first)
        ),
    )


FAMILY = Family(spec, {**DENSE, **PRE_NORM, **ATTENTION_BIAS})
