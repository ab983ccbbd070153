"""Metrics for Prometheus, under vLLM's names where it has one, else under ``tokenmill:``.

The engine's own numbers are in `engine_metrics` beside it; here is what is counted and timed per request.

Source of the names: https://docs.vllm.ai/en/latest/usage/metrics.html and, for those of HTTP,
https://github.com/trallnag/prometheus-fastapi-instrumentator
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tokenmill.engine.config import EngineConfig
from tokenmill.server.call import Call, Outcome
from tokenmill.server.config import ObserveConfig
from tokenmill.server.observability.engine_metrics import EngineCollector, Snapshot
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
_COUNT = (1, 2, 5, 10, 20)
_HTTP = (0.1, 0.5, 1)
_HTTP_FINE = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5),
    *(10, 30, 60),
)

_RECENT = 0.1
"""Weight of the latest request in the mean of how long requests lately waited."""


class Metrics:
    """Watches the engine, calls and HTTP requests, and renders what it saw.

    It is an `Observer` of `tokenmill.llm` and an `Interceptor` of `tokenmill.server.call`. Counters and gauges of the
    engine are read from its own statistics when Prometheus asks, so they can neither drift from them nor cost anything
    per step.

    Args:
        model_name: value of the label ``model_name``.
        engine: how the engine is configured.
        observe: the goals, and whether old names are exported too.
        clock: the clock of the engine's statistics.
    """

    def __init__(
        self,
        model_name: str,
        engine: EngineConfig | None = None,
        observe: ObserveConfig | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        observe = observe or ObserveConfig()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._registry = CollectorRegistry(auto_describe=False)
        self._families: dict[str, Histogram] = {}
        self._goals = {"ttft": observe.ttft_slo_ms / 1000, "tpot": observe.tpot_slo_ms / 1000}
        self._queue_s = 0.0
        ProcessCollector(registry=self._registry)
        self._engine = EngineCollector(
            self._labels, engine or EngineConfig(), self._goals["ttft"], observe.legacy_metrics, clock
        )
        self._registry.register(self._engine)
        self._make_times(observe.legacy_metrics)
        self._make_sizes()
        self._make_server()

    def _make_times(self, legacy: bool) -> None:
        between = "vllm:inter_token_latency_seconds"
        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "From arrival to first token.", _TTFT)
        self._between_tokens = self._histogram(between, "Between tokens that reach the caller.", _PER_TOKEN)
        if legacy:
            self._registry.register(_Renamed(self._families[between], "vllm:time_per_output_token_seconds"))
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

    def _make_sizes(self) -> None:
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Tokens of the prompt.", _LENGTH)
        self._generated = self._histogram("vllm:request_generation_tokens", "Tokens generated.", _LENGTH)
        self._longest = self._histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of the longest completion of a request.", _LENGTH
        )
        self._max_tokens = self._histogram("vllm:request_params_max_tokens", "The limit asked for.", _LENGTH)
        self._n = self._histogram("vllm:request_params_n", "Completions asked for.", _COUNT)
        self._computed = self._histogram(
            "vllm:request_prefill_kv_computed_tokens", "Tokens of the prompt that were not in the cache.", _LENGTH
        )
        self._preemptions = self._histogram(
            "vllm:request_num_preemptions", "How often it lost its memory.", (0, *_COUNT)
        )
        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens computed per engine step.", _STEP_TOKENS
        )

    def _make_server(self) -> None:
        self._goodput = Counter(
            "tokenmill:goodput_requests",
            "Requests by whether they met what is aimed for: first token, tokens after it, and all of it.",
            (*self._labels, "slo", "met"),
            registry=self._registry,
        )
        self._refused = Counter(
            "tokenmill:requests_refused", "HTTP requests answered with an error, by its code.", ("code",),
            registry=self._registry,
        )  # fmt: skip
        self._start = Gauge(
            "tokenmill:start_seconds", "From the start of the process until it served.", registry=self._registry
        )
        self._answers = Counter(
            "http_requests", "HTTP requests by route, method and kind of status.", ("handler", "method", "status"),
            registry=self._registry,
        )  # fmt: skip
        self._durations = Histogram(
            "http_request_duration_seconds", "From request to the end of the answer.", ("handler", "method"),
            buckets=_HTTP, registry=self._registry,
        )  # fmt: skip
        self._fine_durations = Histogram(
            "http_request_duration_highr_seconds", "The same for all routes together, in fine buckets.",
            buckets=_HTTP_FINE, registry=self._registry,
        )  # fmt: skip

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        kind = _Lengths if buckets is _LENGTH else Histogram
        family = kind(name, help, tuple(self._labels), buckets=buckets, registry=self._registry)
        self._families[name] = family
        return family.labels(**self._labels)

    def add(self, collector: Collector) -> None:
        """Renders what `collector` yields beside our own."""
        self._registry.register(collector)

    def render(self, stats: EngineStats, up: bool = True, draining: bool = False, restarts: int = 0) -> bytes:
        """Everything in Prometheus' text format, the engine and the server being in this state."""
        self._engine.snapshot = Snapshot(stats, up, draining, restarts, self._queue_s)
        for family in self._families.values():
            if isinstance(family, _Lengths):
                family.longest = stats.max_model_len
        return generate_latest(self._registry)

    def started(self, seconds: float) -> None:
        """The server is ready, so long after the process began."""
        self._start.set(seconds)

    def answered(self, route: str, method: str, status: int, code: str, seconds: float) -> None:
        """An HTTP request was answered.

        Args:
            route: the pattern of its path, or ``none`` when there is no such route: never the path itself.
            code: of the error that was the answer; empty when it was none.
        """
        self._answers.labels(route, method, f"{status // 100}xx").inc()
        self._durations.labels(route, method).observe(seconds)
        self._fine_durations.observe(seconds)
        if code:
            self._refused.labels(code).inc()

    def step(self, stats: EngineStats) -> None:
        """After an engine step."""
        self._step_tokens.observe(stats.step_tokens)

    def tokens(self, request_id: str, count: int, since_last_s: float | None) -> None:
        """After tokens of a request arrived; the first ones have no predecessor."""
        if since_last_s is not None and count > 0:
            self._between_tokens.observe(since_last_s)

    def finished(self, stats: RequestStats, reason: FinishReason, params: SamplingParams) -> None:
        """After a completion ended, however it did; the engine itself counts the reasons."""
        self._total.observe(stats.finished - stats.arrival)
        self._prompt.observe(stats.prompt_tokens)
        self._generated.observe(stats.generated_tokens)
        self._preemptions.observe(stats.preemptions)
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)
        if stats.scheduled is None:
            return
        queue = stats.scheduled - stats.arrival
        self._queue.observe(queue)
        self._queue_s += _RECENT * (queue - self._queue_s)
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

    async def begin(self, call: Call) -> None:
        """Everything is known at the end only."""

    def end(self, call: Call, outcome: Outcome) -> None:
        """After a call ended: what concerns all of its completions together."""
        if not outcome.stats:
            return
        self._n.observe(call.params.n)
        self._longest.observe(max(each.generated_tokens for each in outcome.stats))
        if any(self._goals.values()) and "abort" not in outcome.finish_reasons:
            self._judge(outcome)

    def _judge(self, outcome: Outcome) -> None:
        """Counts a request against what is aimed for. One that failed has met nothing; one given up is not counted."""
        served = "error" not in outcome.finish_reasons
        slowest = {"ttft": 0.0, "tpot": 0.0}
        for each in outcome.stats:
            if each.first_token is None:
                served = False
                continue
            slowest["ttft"] = max(slowest["ttft"], each.first_token - each.arrival)
            pace = (each.finished - each.first_token) / max(1, each.generated_tokens - 1)
            slowest["tpot"] = max(slowest["tpot"], pace)
        met = {name: served and slowest[name] <= goal for name, goal in self._goals.items() if goal > 0}
        for name, good in (met | {"all": all(met.values())}).items():
            self._goodput.labels(*self._labels.values(), name, str(good).lower()).inc()


class _Lengths(Histogram):
    """A histogram of lengths, whose buckets end with the longest length there can be."""

    longest = _LENGTH[-1]

    def collect(self) -> Iterable[Metric]:
        for family in super().collect():
            family.samples = [
                sample
                for sample in family.samples
                if (bound := sample.labels.get("le", "+Inf")) == "+Inf" or float(bound) <= self.longest
            ]
            yield family


class _Renamed(Collector):
    """A histogram under another name."""

    def __init__(self, family: Histogram, name: str) -> None:
        self._family = family
        self._name = name

    def collect(self) -> Iterable[Metric]:
        for family in self._family.collect():
            other = Metric(self._name, f"Old name of {family.name}.", family.type)
            for sample in family.samples:
                other.samples.append(sample._replace(name=self._name + sample.name.removeprefix(family.name)))
            yield other
