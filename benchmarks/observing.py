"""What it costs to watch a request: metrics, the line in the log, spans, and content filters.

    python benchmarks/observing.py [--repeats 7]

No model runs. A request has 128 tokens; each part is called as the server calls it. A repeat is the mean of 2,000
requests; the least of the repeats is shown, in microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import time
from collections.abc import Callable

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tokenmill.server.call import Call, Outcome
from tokenmill.server.config import FilterConfig
from tokenmill.server.filters.pii import FILTER
from tokenmill.server.observability.logs import Formatter, request_line
from tokenmill.server.observability.metrics import Metrics
from tokenmill.server.observability.record import Record
from tokenmill.server.observability.tracing import Tracing
from tokenmill.types import FinishReason, RequestStats, SamplingParams

REQUESTS = 2_000
TOKENS = 128
PARAMS = SamplingParams(max_tokens=TOKENS)
STATS = RequestStats(
    arrival=0.0, scheduled=0.01, first_token=0.1, finished=2.0, prompt_tokens=500, generated_tokens=TOKENS,
    cached_tokens=256, recomputed_tokens=0, preemptions=0, misses={"cold": 244},
)  # fmt: skip
CALL = Call(request_id="cmpl-1", endpoint="/v1/completions", model="demo", prompt="", params=PARAMS)
OUTCOME = Outcome(("stop",), "", 500, 256, TOKENS, (STATS,), 2.0)


def observed() -> Callable[[], None]:
    metrics = Metrics("demo")

    def request() -> None:
        metrics.tokens("cmpl-1", 1, None)
        for _ in range(TOKENS - 1):
            metrics.tokens("cmpl-1", 1, 0.015)
        metrics.finished(STATS, FinishReason.STOP, PARAMS)
        metrics.end(CALL, OUTCOME)
        metrics.answered("/v1/completions", "POST", 200, "", 2.0)

    return request


def logged() -> Callable[[], None]:
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(Formatter("json"))
    logger = logging.getLogger("tokenmill")
    logger.handlers[:], logger.propagate = [handler], False
    logger.setLevel(logging.INFO)

    def request() -> None:
        record = Record({"request_id": "a"})
        record.calls.append((CALL, OUTCOME))
        request_line(record, "POST", "/v1/completions", 200, 2.0)

    return request


def traced() -> Callable[[], None]:
    provider = TracerProvider()
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def nothing(_: str) -> list[object]:
        return []

    tracing = Tracing(provider, nothing)  # type: ignore[arg-type]
    loop = asyncio.new_event_loop()

    async def call() -> None:
        await tracing.begin(CALL)
        tracing.end(CALL, OUTCOME)
        await tracing.settle()

    def request() -> None:
        loop.run_until_complete(call())
        exporter.clear()

    return request


def filtered() -> Callable[[], None]:
    words = "The quick brown fox jumps over 12 lazy dogs, and so on. " * 20
    pieces = [words[at : at + 4] for at in range(0, 4 * TOKENS, 4)]
    pii = FILTER(FilterConfig())
    loop = asyncio.new_event_loop()

    async def call() -> None:
        stream = pii.stream()
        for piece in pieces:
            await stream.push(piece)
        await stream.finish()

    return lambda: loop.run_until_complete(call())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    parts = {"metrics": observed(), "log line": logged(), "span": traced(), "filter pii": filtered()}
    for name, request in parts.items():
        count = REQUESTS if name != "filter pii" else REQUESTS // 100
        best = float("inf")
        for _ in range(repeats):
            begun = time.perf_counter()
            for _ in range(count):
                request()
            best = min(best, (time.perf_counter() - begun) / count)
        print(f"{name:12} {1e6 * best:8.1f} µs per request, {1e6 * best / TOKENS:6.2f} per token")


if __name__ == "__main__":
    main()
