"""Mistral 7B and its successors (arXiv 2310.06825): Llama with a sliding window in every layer."""

from tokenmill.models.family import DENSE, PRE_NORM, Config, Family, attention, dense, mlp, repeat
from tokenmill.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    window = config.get("sliding_window", 4096)  # absent means the first release's window, null means none
    layer = LayerSpec(attention({"num_key_value_heads": 8, **config}, window=window), mlp(config))
    return dense(config, repeat(config, layer))


FAMILY = Family(spec, {**DENSE, **PRE_NORM})
