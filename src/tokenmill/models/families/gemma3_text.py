"""Gemma 3, text only (arXiv 2503.19786): five layers with a window to one without, each kind with its own rotation."""

from dataclasses import replace

from tokenmill.models.family import (
    ATTENTION_BIAS,
    DENSE,
    QK_NORM,
    SANDWICH_NORM,
    Config,
    Family,
    attention,
    dense,
    mlp,
    offset_norms,
    require,
    rope,
    unsupported,
    windows,
)
from tokenmill.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    config = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, **config}
    if config.get("use_bidirectional_attention"):
        raise unsupported("its attention is not causal", "use_bidirectional_attention")
    every = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    bias = bool(config.get("attention_bias", False))
    scale = float(config.get("query_pre_attn_scalar") or 256) ** -0.5
    whole = attention(
        config,
        scale=scale,
        rope=rope(config, theta=1e6, layer_type="full_attention"),
        qkv_bias=bias,
        out_bias=bias,
        norm="per_head",
    )
    # The older form gives the local layers a base of their own and never scales them.
    old = {**config, "rope_theta": config.get("rope_local_base_freq", 1e4), "rope_scaling": None}
    local = replace(whole, rope=rope(old, layer_type="sliding_attention"))
    feed_forward = mlp(config)
    return dense(
        config,
        tuple(
            LayerSpec(replace(local, window=window) if window else whole, feed_forward, "sandwich_norm")
            for window in windows(config, lambda index: (index + 1) % every != 0)
        ),
        tied_head=bool(config.get("tie_word_embeddings", True)),
        embedding_scale=float(require(config, "hidden_size")) ** 0.5,
        logit_softcap=config.get("final_logit_softcapping"),
    )


FAMILY = Family(spec, offset_norms({**DENSE, **SANDWICH_NORM, **QK_NORM, **ATTENTION_BIAS}, 1.0))
