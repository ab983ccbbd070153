"""Phi-3, Phi-3.5 and Phi-4 (mini) (arXiv 2404.14219, 2503.01743): q, k, v and gate, up come fused; LongRoPE."""

from tokenmill.models.family import COMMON, PRE_NORM, Config, Family, Into, attention, dense, mlp, repeat
from tokenmill.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    layer = LayerSpec(attention(config, window=config.get("sliding_window")), mlp(config))
    return dense(config, repeat(config, layer), norm_eps=float(config.get("rms_norm_eps") or 1e-5))


FUSED = {
    "model.layers.{}.self_attn.qkv_proj.weight": Into("layers.{}.attention.qkv"),
    "model.layers.{}.mlp.gate_up_proj.weight": Into("layers.{}.mlp.gate_up"),
}
FAMILY = Family(spec, {**COMMON, **PRE_NORM, **FUSED})
