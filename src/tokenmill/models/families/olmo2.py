"""OLMo 2 (arXiv 2501.00656): norms after each part only, and over the whole of q and k."""

from tokenmill.models.family import (
    ATTENTION_BIAS,
    DENSE,
    POST_NORM,
    QK_NORM,
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
    layer = LayerSpec(attention(config, qkv_bias=bias, out_bias=bias, norm="whole"), mlp(config), "post_norm")
    return dense(config, repeat(config, layer), norm_eps=float(config.get("rms_norm_eps") or 1e-5))


FAMILY = Family(spec, {**DENSE, **POST_NORM, **QK_NORM, **ATTENTION_BIAS})
