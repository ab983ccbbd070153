"""Options of the engine, grouped by owner, and the folders whose files are the choices."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenmill.config import option
from tokenmill.engine.kv.eviction import EVICTION
from tokenmill.models.config import ModelConfig
from tokenmill.registry import Registry

__all__ = ["BATCHING", "GRAMMARS", "POLICIES", "CacheConfig", "EngineConfig", "SchedulerConfig"]

POLICIES: Registry[Any] = Registry("tokenmill.engine.policies", "policies", "POLICY")
"""Scheduling policies: each module defines ``POLICY``, a subclass of `engine.policy.Policy`."""

BATCHING: Registry[Any] = Registry("tokenmill.engine.batching", "batching", "BATCHING")
"""Batching modes: each module defines ``BATCHING``, a subclass of `engine.policy.Batching`."""

GRAMMARS: Registry[Any] = Registry("tokenmill.engine.grammars", "grammars", "GRAMMAR")
"""Grammar engines: each module defines ``GRAMMAR``, an `engine.grammar.Backend`."""


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """KV memory."""

    block_size: int = option(16, "tokens per KV block", low=1, high=1024)
    memory_gib: float = option(0.0, "memory for the KV cache; 0 takes what is sensible here", low=0)
    kv_dtype: str = option(
        "auto",
        "type of cached keys and values; auto is the model's, int8 takes half of bfloat16",
        choices=("auto", "int8"),
    )
    prefix_caching: bool = option(True, "keep and share the KV of equal prompt beginnings")
    eviction: str = option("lru", "which cached block goes first", choices=tuple(EVICTION))
    prefix_ttl_s: float = option(0.0, "seconds after which unused cached KV is dropped; 0 never", low=0)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What runs when."""

    policy: str = option("fcfs", "order of requests", choices=POLICIES)
    batching: str = option("continuous", "when a request may join the batch", choices=BATCHING)
    max_num_seqs: int = option(64, "requests that run at once", low=1)
    max_num_batched_tokens: int = option(512, "tokens computed in one step", low=1)
    max_waiting: int = option(1024, "requests that may wait; more are refused with queue_full", low=1)
    batch_wait_ms: float = option(50.0, "dynamic batching: how long to wait for a batch to fill", low=0)
    starvation_s: float = option(60.0, "after this long in the queue a request goes first, whatever the policy", low=0)
    ttft_goal_ms: float = option(0.0, "adaptive policy: time to first token to aim for; 0 none", low=0)
    tpot_goal_ms: float = option(0.0, "adaptive policy: time per output token to aim for; 0 none", low=0)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Everything the engine obeys."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    grammar_backend: str = option("llguidance", "what computes the masks of structured output", choices=GRAMMARS)
    seed: int = option(0, "seed for requests that bring none")
    events: int = option(65536, "decisions kept in memory for explanations", low=0)
    hang_timeout_s: float = option(120.0, "restart the engine when no step ends for this long; 0 never", low=0)
