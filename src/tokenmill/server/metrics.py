"""Metrics for Prometheus, under vLLM's names where it has one, else under ``tokenmill:``.

Source of the names: https://docs.vllm.ai/en/latest/usage/metrics.html
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenmill.types import Clock, EngineStats, FinishReason, RequestStats, SamplingParams

__all__ = ["Metrics"]

_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
    *(160, 640, 2560),
)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960),
    *(1920, 7680),
)
_STEP_TOKENS = (1, 8, *(2**power for power in range(4, 15)))
_LENGTH = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
"""1-2-5 series up to five million tokens: the longest context is not known before the model is."""


class Metrics:
    """Watches the engine (it is an `Observer` of `tokenmill.llm`) and renders what it saw.

    Counters and gauges are read from the engine's own statistics when Prometheus asks, so they can neither drift from
    them nor cost anything per step.

    Args:
        model_name: value of the label ``model_name``.
        clock: the clock of the engine's statistics.
    """

    def __init__(self, model_name: str, clock: Clock = time.monotonic) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._engine = _EngineCollector(self._labels, clock)
        self._registry.register(self._engine)

        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "From arrival to first token.", _TTFT)
        self._between_tokens = self._histogram(
            "vllm:inter_token_latency_seconds", "Between tokens that reach the caller.", _PER_TOKEN
        )
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first.", _PER_TOKEN
        )
        self._total = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", _REQUEST)
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first time it was scheduled.", _REQUEST
        )
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds", "From first scheduled to the end.", _REQUEST
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "From first scheduled to first token.", _REQUEST
        )
        self._decode = self._histogram("vllm:request_decode_time_seconds", "From first token to the end.", _REQUEST)
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Tokens of the prompt.", _LENGTH)
        self._generated = self._histogram("vllm:request_generation_tokens", "Tokens generated.", _LENGTH)
        self._max_tokens = self._histogram("vllm:request_params_max_tokens", "The limit asked for.", _LENGTH)
        self._computed = self._histogram(
            "vllm:request_prefill_kv_computed_tokens", "Tokens of the prompt that were not in the cache.", _LENGTH
        )
        self._preemptions = self._histogram(
            "vllm:request_num_preemptions", "How often it lost its memory.", (0, 1, 2, 5, 10, 20)
        )
        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens computed per engine step.", _STEP_TOKENS
        )

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(name, help, tuple(self._labels), buckets=buckets, registry=self._registry)
        return family.labels(**self._labels)

    def add(self, collector: Collector) -> None:
        """Renders what `collector` yields beside our own."""
        self._registry.register(collector)

    def render(self, stats: EngineStats) -> bytes:
        """Everything in Prometheus' text format, the engine being in this state."""
        self._engine.stats = stats
        return generate_latest(self._registry)

    def step(self, stats: EngineStats) -> None:
        """After an engine step."""
        self._step_tokens.observe(stats.step_tokens)

    def tokens(self, request_id: str, count: int, since_last_s: float | None) -> None:
        """After tokens of a request arrived; the first ones have no predecessor."""
        if since_last_s is not None and count > 0:
            self._between_tokens.observe(since_last_s)

    def finished(self, stats: RequestStats, reason: FinishReason, params: SamplingParams) -> None:
        """After a request ended, however it did; the engine itself counts the reasons."""
        self._total.observe(stats.finished - stats.arrival)
        self._prompt.observe(stats.prompt_tokens)
        self._generated.observe(stats.generated_tokens)
        self._preemptions.observe(stats.preemptions)
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)
        if stats.scheduled is None:
            return
        self._queue.observe(stats.scheduled - stats.arrival)
        self._inference.observe(stats.finished - stats.scheduled)
        self._computed.observe(stats.prompt_tokens - stats.cached_tokens)
        if stats.first_token is None:
            return
        self._first_token.observe(stats.first_token - stats.arrival)
        self._prefill.observe(stats.first_token - stats.scheduled)
        decode = stats.finished - stats.first_token
        self._decode.observe(decode)
        if stats.generated_tokens > 1:
            self._per_token.observe(decode / (stats.generated_tokens - 1))


class _EngineCollector(Collector):
    """The engine's statistics as Prometheus families, made when asked for."""

    def __init__(self, labels: dict[str, str], clock: Clock) -> None:
        self.stats: EngineStats | None = None
        self._labels = labels
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        if self.stats is not None:
            yield from self._gauges(self.stats)
            yield from self._counters(self.stats)

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        busy = stats.running + stats.waiting > 0
        yield self._gauge("vllm:num_requests_running", "Requests that hold memory and are computed.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", stats.waiting)
        yield self._family(
            GaugeMetricFamily,
            "vllm:num_requests_waiting_by_reason",
            "Requests in the queue, by what they wait for.",
            "reason",
            stats.waiting_by_reason.items(),
        )
        yield self._gauge(
            "vllm:kv_cache_usage_perc",
            "Part of the KV blocks that requests hold, 0 to 1.",
            stats.blocks_used / max(stats.blocks_total, 1),
        )
        cache = {"block_size": str(stats.block_size), "num_gpu_blocks": str(stats.blocks_total)}
        info = GaugeMetricFamily("vllm:cache_config_info", "Size of the KV cache.", labels=(*self._labels, *cache))
        info.add_metric((*self._labels.values(), *cache.values()), 1)
        yield info
        yield self._gauge(
            "tokenmill:kv_blocks_reusable", "KV blocks that nobody holds but that can be hit.", stats.blocks_cached
        )
        yield self._gauge(
            "tokenmill:last_progress_seconds",
            "Time since the engine last made progress; 0 while it has nothing to do. Alert when it grows.",
            max(0.0, self._clock() - stats.last_progress) if busy else 0.0,
        )
        yield self._gauge("tokenmill:last_step_seconds", "How long the latest step took.", stats.step_seconds)

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        computed = stats.prompt_tokens - stats.prefix_hits
        for name, help, value in (
            ("vllm:prompt_tokens", "Tokens of prompts that were processed.", stats.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("vllm:prompt_tokens_cached", "Tokens of prompts found in the prefix cache.", stats.prefix_hits),
            ("vllm:prefix_cache_queries", "Tokens of prompts looked up in the prefix cache.", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Tokens of prompts found in the prefix cache.", stats.prefix_hits),
            ("vllm:num_preemptions", "How often a running request lost its memory.", stats.preemptions),
            ("tokenmill:padded_tokens", "Tokens computed only to fill up a batch.", stats.padded_tokens),
            ("tokenmill:engine_steps", "Steps of the engine.", stats.steps),
        ):
            yield self._family(CounterMetricFamily, name, help, "", [("", value)])
        for name, help, label, values in (
            (
                "vllm:prompt_tokens_by_source",
                "Tokens of prompts by where their KV came from.",
                "source",
                {"local_compute": max(0, computed), "local_cache_hit": stats.prefix_hits},
            ),
            ("vllm:request_success", "Requests that ended, by how.", "finished_reason", stats.finished),
            (
                "tokenmill:prefix_cache_miss_tokens",
                "Tokens of prompts that were not in the prefix cache, by why.",
                "reason",
                stats.misses,
            ),
            (
                "tokenmill:recompute_tokens",
                "Tokens computed again, by why.",
                "cause",
                {"preempt": stats.recomputed_tokens},
            ),
        ):
            yield self._family(CounterMetricFamily, name, help, label, values.items())

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        return self._family(GaugeMetricFamily, name, help, "", [("", value)])

    def _family(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        help: str,
        label: str,
        values: Iterable[tuple[str, float]],
    ) -> Metric:
        """A family with one sample per value of `label`; without a label, with one sample."""
        own = (label,) if label else ()
        family = kind(name, help, labels=(*self._labels, *own))
        for key, value in values:
            family.add_metric((*self._labels.values(), *((key,) if label else ())), value)
        return family
