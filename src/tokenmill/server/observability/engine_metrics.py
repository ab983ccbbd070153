"""The engine's statistics as Prometheus families, under vLLM's names where it has one.

Source of the names: https://docs.vllm.ai/en/latest/usage/metrics.html
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenmill.engine.config import EngineConfig
from tokenmill.types import Clock, EngineStats

__all__ = ["EngineCollector", "Snapshot", "saturation"]


def saturation(stats: EngineStats, max_num_seqs: int, queue_s: float = 0.0, goal_s: float = 0.0) -> float:
    """How near the engine is to its bound: 1 is at it, above 1 requests pay for it. For autoscaling.

    The largest of three:

    - the part of the KV memory that requests hold;
    - requests, running and waiting, per seat in the batch;
    - while requests wait: how long they lately waited, as a part of the time to first token that is aimed for.

    Args:
        stats: the engine's state.
        max_num_seqs: seats in the batch.
        queue_s: how long requests lately waited.
        goal_s: the time to first token to aim for; 0 is none.
    """
    memory = stats.blocks_used / max(stats.blocks_total, 1)
    seats = (stats.running + stats.waiting) / max_num_seqs
    patience = queue_s / goal_s if goal_s > 0 and stats.waiting else 0.0
    return max(memory, seats, patience)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What is known about the engine when Prometheus asks."""

    stats: EngineStats
    up: bool
    """Whether the engine process lives and its steps advance."""
    draining: bool
    """Whether the server takes no more requests."""
    restarts: int
    """How often the engine was started again."""
    queue_s: float = 0.0
    """How long requests lately waited."""


class EngineCollector(Collector):
    """Makes the families when asked.

    Args:
        labels: of every sample.
        engine: how the engine is configured.
        goal_s: the time to first token to aim for; 0 is none.
        legacy: whether the names that vLLM has given up are exported too.
        clock: the clock of the statistics.
    """

    def __init__(self, labels: Mapping[str, str], engine: EngineConfig, goal_s: float, legacy: bool, clock: Clock):
        self.snapshot: Snapshot | None = None
        self._labels = labels
        self._engine = engine
        self._goal_s = goal_s
        self._legacy = legacy
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        if self.snapshot is None:
            return
        stats = self.snapshot.stats
        yield from self._requests(stats)
        yield from self._memory(stats)
        yield from self._tokens(stats)
        yield from self._health(self.snapshot)
        if self._legacy:
            yield from self._given_up(stats)

    def _requests(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge("vllm:num_requests_running", "Requests that hold memory and are computed.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", stats.waiting)
        yield self._gauge(
            "vllm:num_requests_waiting_by_reason",
            "Requests in the queue, by what they wait for.",
            stats.waiting_by_reason,
            "reason",
        )
        yield self._counter("vllm:request_success", "Requests that ended, by how.", stats.finished, "finished_reason")
        yield self._counter("vllm:num_preemptions", "How often a running request lost its memory.", stats.preemptions)

    def _memory(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "Part of the KV blocks that requests hold, 0 to 1.", _usage(stats)
        )
        config = self._engine.cache
        cache = {
            "block_size": str(stats.block_size),
            "num_gpu_blocks": str(stats.blocks_total),
            "cache_dtype": config.kv_dtype,
            "enable_prefix_caching": str(config.prefix_caching),
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "Size of the KV cache.", labels=(*self._labels, *cache))
        info.add_metric((*self._labels.values(), *cache.values()), 1)
        yield info
        yield self._gauge(
            "tokenmill:kv_blocks_reusable", "KV blocks that nobody holds but that can be hit.", stats.blocks_cached
        )

    def _tokens(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._counter("vllm:prompt_tokens", "Tokens of prompts that were processed.", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens)
        sources = {
            "local_compute": max(0, stats.prompt_tokens - stats.prefix_hits),
            "local_cache_hit": stats.prefix_hits,
        }
        yield self._counter(
            "vllm:prompt_tokens_by_source", "Tokens of prompts by where their KV came from.", sources, "source"
        )
        yield self._counter(
            "vllm:prompt_tokens_cached", "Tokens of prompts found in the prefix cache.", stats.prefix_hits
        )
        yield self._counter(
            "vllm:prompt_tokens_recomputed",
            "Tokens that were cached but computed again, because a whole prompt was.",
            stats.misses.get("last_token", 0),
        )
        yield self._counter(
            "vllm:prefix_cache_queries", "Tokens of prompts looked up in the prefix cache.", stats.prefix_queries
        )
        yield self._counter("vllm:prefix_cache_hits", "Tokens of prompts found in the prefix cache.", stats.prefix_hits)
        yield self._counter(
            "tokenmill:prefix_cache_miss_tokens",
            "Tokens of prompts that were not in the prefix cache, by why.",
            stats.misses,
            "reason",
        )
        yield self._counter(
            "tokenmill:recompute_tokens",
            "Tokens computed again, by why.",
            {"preempt": stats.recomputed_tokens},
            "cause",
        )
        computed = stats.prompt_tokens - stats.prefix_hits + stats.generation_tokens
        yield self._gauge(
            "tokenmill:recompute_tax_ratio",
            "Part of all computed tokens that were computed again after a preemption.",
            stats.recomputed_tokens / max(1, computed + stats.recomputed_tokens),
        )
        yield self._counter("tokenmill:padded_tokens", "Tokens computed only to fill up a batch.", stats.padded_tokens)

    def _health(self, snapshot: Snapshot) -> Iterator[Metric]:
        stats = snapshot.stats
        busy = stats.running + stats.waiting > 0
        yield self._gauge(
            "tokenmill:saturation_ratio",
            "Nearness to the bound: 1 is at it. Largest of KV use, requests per seat, and wait per time aimed for.",
            saturation(stats, self._engine.scheduler.max_num_seqs, snapshot.queue_s, self._goal_s),
        )
        yield self._gauge(
            "tokenmill:last_progress_seconds",
            "Time since the engine last made progress; 0 while it has nothing to do. Alert when it grows.",
            max(0.0, self._clock() - stats.last_progress) if busy else 0.0,
        )
        yield self._gauge("tokenmill:engine_up", "1 while the engine lives and its steps advance.", int(snapshot.up))
        yield self._gauge("tokenmill:draining", "1 while no more requests are taken.", int(snapshot.draining))
        yield self._counter("tokenmill:engine_restarts", "How often the engine was started again.", snapshot.restarts)
        yield self._counter("tokenmill:engine_steps", "Steps of the engine.", stats.steps)
        yield self._gauge("tokenmill:last_step_seconds", "How long the latest step took.", stats.step_seconds)

    def _given_up(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge("vllm:gpu_cache_usage_perc", "Old name of vllm:kv_cache_usage_perc.", _usage(stats))
        yield self._counter(
            "vllm:gpu_prefix_cache_queries", "Old name of vllm:prefix_cache_queries_total.", stats.prefix_queries
        )
        yield self._counter(
            "vllm:gpu_prefix_cache_hits", "Old name of vllm:prefix_cache_hits_total.", stats.prefix_hits
        )

    def _gauge(self, name: str, help: str, values: float | Mapping[str, float], label: str = "") -> Metric:
        return self._fill(GaugeMetricFamily(name, help, labels=self._names(label)), values)

    def _counter(self, name: str, help: str, values: float | Mapping[str, float], label: str = "") -> Metric:
        return self._fill(CounterMetricFamily(name, help, labels=self._names(label)), values)

    def _names(self, label: str) -> tuple[str, ...]:
        return (*self._labels, label) if label else tuple(self._labels)

    def _fill(self, family: GaugeMetricFamily | CounterMetricFamily, values: float | Mapping[str, float]) -> Metric:
        """One sample per value of the family's own label; without one, one sample."""
        own: Iterable[tuple[tuple[str, ...], float]] = (
            [((key,), value) for key, value in values.items()] if isinstance(values, Mapping) else [((), values)]
        )
        for key, value in own:
            family.add_metric((*self._labels.values(), *key), value)
        return family


def _usage(stats: EngineStats) -> float:
    return stats.blocks_used / max(stats.blocks_total, 1)
