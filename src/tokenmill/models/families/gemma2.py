"""Gemma 2 (arXiv 2408.00118): norms before and after each part, every other layer with a window, capped logits."""

from dataclasses import replace

from tokenmill.models.family import (
    ATTENTION_BIAS,
    DENSE,
    SANDWICH_NORM,
    Config,
    Family,
    attention,
    dense,
    mlp,
    offset_norms,
    require,
    windows,
)
from tokenmill.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    config = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, **config}
    bias = bool(config.get("attention_bias", False))
    base = attention(
        config,
        scale=float(config.get("query_pre_attn_scalar") or 256) ** -0.5,
        softcap=config.get("attn_logit_softcapping", 50.0),
        qkv_bias=bias,
        out_bias=bias,
    )
    feed_forward = mlp(config)
    return dense(
        config,
        tuple(
            LayerSpec(replace(base, window=window), feed_forward, "sandwich_norm")
            for window in windows(config, lambda index: index % 2 == 0)
        ),
        tied_head=bool(config.get("tie_word_embeddings", True)),
        embedding_scale=float(require(config, "hidden_size")) ** 0.5,
        logit_softcap=config.get("final_logit_softcapping", 30.0),
    )


FAMILY = Family(spec, offset_norms({**DENSE, **SANDWICH_NORM, **ATTENTION_BIAS}, 1.0))
