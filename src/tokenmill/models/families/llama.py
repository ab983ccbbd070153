"""Llama 1 to 3.3 (arXiv 2302.13971, 2307.09288, 2407.21783), and the many models that share its configuration."""

from tokenmill.models.family import (
    ATTENTION_BIAS,
    DENSE,
    MLP_BIAS,
    PRE_NORM,
    Config,
    Family,
    attention,
    dense,
    mlp,
    repeat,
)
from tokenmill.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    layer = LayerSpec(
        attention(config, qkv_bias=bias, out_bias=bias), mlp(config, bias=bool(config.get("mlp_bias", False)))
    )
    return dense(config, repeat(config, layer))


FAMILY = Family(spec, {**DENSE, **PRE_NORM, **ATTENTION_BIAS, **MLP_BIAS})
