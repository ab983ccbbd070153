"""How much KV memory a model gets, and how long a sequence it then holds."""

from __future__ import annotations

import dataclasses

from tokenmill.engine.config import EngineConfig
from tokenmill.errors import ConfigError
from tokenmill.models.spec import KVLayout, ModelSpec, kv_layout, pool_blocks

__all__ = ["ModelFacts", "size_memory"]

# Share of the free memory that the KV cache may take by default; the rest is for activations and everything else.
_AUTO_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What the scheduler must know about the model and its memory."""

    layout: KVLayout
    num_blocks: int
    """Blocks in the physical buffers, the null block included."""
    max_model_len: int
    """Longest sequence, prompt and output."""
    vocab_size: int
    hidden_size: int
    """Entries of a hidden state, and so of an embedding."""
    eos_ids: tuple[int, ...]


def size_memory(
    config: EngineConfig, spec: ModelSpec, dtype_bytes: int, available: int, eos_ids: tuple[int, ...]
) -> ModelFacts:
    """Blocks and longest sequence for a memory budget: `models.spec` states the formulas, the engine obeys them.

    Args:
        available: bytes that can be taken when the options leave the budget open.

    Raises:
        ConfigError: ``kv_memory_too_small`` when the longest sequence asked for, or any, does not fit.
    """
    layout = kv_layout(spec, config.cache.block_size, dtype_bytes, quantized=config.cache.kv_dtype == "int8")
    chunk = config.scheduler.max_num_batched_tokens
    longest = config.model.max_model_len or spec.max_position
    wanted = config.scheduler.max_num_seqs * layout.blocks_for(longest, chunk) * layout.block_bytes
    budget = int(config.cache.memory_gib * 2**30) or min(wanted, int(available * _AUTO_SHARE))
    num_blocks = pool_blocks(layout, budget)
    # The null block and one block per group for copying shared ones are not available to a sequence.
    capacity = layout.capacity(num_blocks - 1 - len(layout.groups), chunk)
    if capacity < 2 or config.model.max_model_len > capacity:
        need = (layout.blocks_for(longest, chunk) + 1 + len(layout.groups)) * layout.block_bytes / 2**30
        raise ConfigError(
            "kv_memory_too_small",
            f"{budget / 2**30:.2f} GiB of KV memory hold a sequence of {max(0, capacity)} tokens, not {longest}. "
            f"Set cache.memory_gib to at least {need:.2f} or lower model.max_model_len.",
            "cache.memory_gib",
        )
    return ModelFacts(layout, num_blocks, min(longest, capacity), spec.vocab_size, spec.hidden_size, eos_ids)
