"""Traces: the attributes of a call, the engine's decisions as child spans, and a collector that may be away."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tokenmill.engine.events import Event
from tokenmill.server.app import create_app
from tokenmill.server.call import Call, Outcome
from tokenmill.server.config import ServerConfig
from tokenmill.server.observability.metrics import Metrics
from tokenmill.server.observability.tracing import Tracing, export_to
from tokenmill.types import RequestStats, SamplingParams

TRACE, PARENT = "ab" * 16, "cd" * 8
STATS = RequestStats(
    arrival=10.0, scheduled=11.0, first_token=13.0, finished=19.0, prompt_tokens=30, generated_tokens=4,
    cached_tokens=16, recomputed_tokens=20, preemptions=1, misses={"cold": 14},
)  # fmt: skip
EVENTS = [
    Event(10.0, 0, "a", "arrive", tokens=30),
    Event(10.5, 1, "a", "defer", "capacity", 30),
    Event(11.0, 2, "a", "hit", tokens=16, blocks=1),
    Event(11.0, 2, "a", "miss", "cold", 14),
    Event(11.0, 2, "a", "admit", tokens=14),
    Event(11.0, 2, "a", "chunk", tokens=8),
    Event(12.0, 3, "a", "chunk", tokens=6),
    Event(13.1, 4, "a", "chunk", tokens=1),
    Event(14.0, 5, "a", "preempt", "b", 31, 2),
    Event(16.0, 8, "a", "resume", tokens=32),
    Event(16.0, 8, "a", "chunk", tokens=32),
    Event(17.0, 9, "a", "chunk", tokens=1),
    Event(19.0, 10, "a", "finish", "stop", 4),
]


class Traced:
    """Tracing into memory."""

    def __init__(self, events: list[Event]) -> None:
        self.asked: list[str] = []
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))

        async def of(request_id: str) -> list[Event]:
            self.asked.append(request_id)
            return events

        self.tracing = Tracing(provider, of)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    @property
    def root(self) -> ReadableSpan:
        [root] = [span for span in self.spans if " " in span.name]
        return root

    def children(self) -> list[tuple[str, float, float]]:
        """Name, start and end on the engine's clock."""
        epoch = self.tracing._epoch
        spans = [span for span in self.spans if span is not self.root]
        assert all(span.parent.span_id == self.root.context.span_id for span in spans)
        assert all(span.context.trace_id == self.root.context.trace_id for span in spans)
        return [
            (span.name, round((span.start_time - epoch) / 1e9, 6), round((span.end_time - epoch) / 1e9, 6))
            for span in spans
        ]

    async def trace(self, outcome: Outcome, n: int = 1, **trace: str) -> Call:
        call = Call(
            request_id="chatcmpl-1", endpoint="/v1/chat/completions", model="m", prompt="secret",
            params=SamplingParams(n=n, max_tokens=9, temperature=0.5, seed=3), trace=trace,
        )  # fmt: skip
        await self.tracing.begin(call)
        self.tracing.end(call, outcome)
        await self.tracing.settle()
        return call


SERVED = Outcome(("stop",), "", 30, 16, 4, (STATS,), 9.5)


async def test_a_call_is_a_span_with_the_conventional_attributes() -> None:
    traced = Traced([])
    await traced.trace(SERVED)
    root = traced.root
    assert root.name == "chat m"
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tokenmill",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 30,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 16,
        "gen_ai.latency.time_in_queue": 1.0,
        "gen_ai.latency.time_to_first_token": 3.0,
        "gen_ai.latency.e2e": 9.5,
        "tokenmill.miss.cold": 14,
    }
    assert {name: root.attributes.get(name) for name in expected} == expected
    assert "secret" not in str(root.attributes)


async def test_the_engines_decisions_are_child_spans_with_their_times() -> None:
    traced = Traced(EVENTS)
    await traced.trace(SERVED)
    assert traced.children() == [
        ("queue", 10.0, 11.0),
        ("prefill", 11.0, 12.0),
        ("prefill", 12.0, 13.0),
        ("preempted", 14.0, 16.0),
        ("prefill", 16.0, 17.0),
        ("decode", 13.0, 19.0),
    ]
    told = {span.name: dict(span.attributes) for span in traced.spans}
    assert told["queue"] == {
        "tokenmill.reason": "capacity", "tokenmill.cached_tokens": 16, "tokenmill.tokens_to_compute": 14,
    }  # fmt: skip
    assert told["preempted"] == {"tokenmill.reason": "b", "tokenmill.tokens_to_compute": 32}
    assert told["prefill"] == {"tokenmill.tokens": 32, "tokenmill.recompute": True}
    assert told["decode"]["tokenmill.tokens"] == 4


async def test_one_given_up_in_the_queue_has_waited_until_then() -> None:
    traced = Traced([EVENTS[0], EVENTS[1], Event(12.0, 3, "a", "finish", "abort")])
    await traced.trace(Outcome(("abort",), "", 30, 0, 0, (), 2.0))
    assert traced.children() == [("queue", 10.0, 12.0)]


async def test_each_completion_is_asked_for() -> None:
    traced = Traced(EVENTS)
    await traced.trace(Outcome(("stop", "stop"), "", 30, 16, 8, (STATS, STATS), 9.5), n=2)
    assert traced.asked == ["chatcmpl-1/0", "chatcmpl-1/1"]
    assert {span.attributes["tokenmill.completion"] for span in traced.spans if span.name == "queue"} == {0, 1}


async def test_the_callers_trace_goes_on() -> None:
    traced = Traced([])
    call = await traced.trace(SERVED, traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="a=b")
    assert f"{traced.root.context.trace_id:032x}" == TRACE
    assert f"{traced.root.parent.span_id:016x}" == PARENT
    assert call.trace["traceparent"] == f"00-{TRACE}-{traced.root.context.span_id:016x}-01"
    assert call.trace["tracestate"] == "a=b"


async def test_what_the_caller_does_not_sample_costs_the_engine_nothing() -> None:
    traced = Traced(EVENTS)
    await traced.trace(SERVED, traceparent=f"00-{TRACE}-{PARENT}-00")
    assert traced.spans == []
    assert traced.asked == []


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01"])
async def test_a_wrong_traceparent_begins_a_new_trace(header: str) -> None:
    traced = Traced([])
    await traced.trace(SERVED, traceparent=header)
    assert traced.root.parent is None


async def test_a_refused_call_is_an_error_and_the_engine_is_not_asked() -> None:
    traced = Traced(EVENTS)
    await traced.trace(Outcome(("abort",), "queue_full", 30, 0, 0, (), 0.1))
    assert traced.root.status.status_code is StatusCode.ERROR
    assert traced.root.attributes["error.type"] == "queue_full"
    assert traced.asked == []


async def test_an_engine_that_cannot_tell_costs_the_children_only() -> None:
    traced = Traced([])

    async def fail(_: str) -> list[Event]:
        raise RuntimeError("gone")

    traced.tracing._events = fail
    await traced.trace(SERVED)
    assert [span.name for span in traced.spans] == ["chat m"]


# ---- over HTTP ------------------------------------------------------------------------------------------------------


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP and keeps the spans."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[Any] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1/traces"


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in sent.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextlib.asynccontextmanager
async def served(llm: Any, provider: TracerProvider) -> AsyncIterator[tuple[httpx2.AsyncClient, Tracing]]:
    """A server that traces to `provider`."""
    app = create_app(llm, ServerConfig(tool_parser="hermes"), Metrics("scripted"))
    tracing = Tracing(provider, llm.events)
    service = app.state.service
    app.state.service = dataclasses.replace(service, interceptors=(tracing, *service.interceptors))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://server") as http:
        yield http, tracing


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_real_exporter_sends_the_tree_to_a_collector(llm: Any, collector: Collector, stream: bool) -> None:
    now = time.monotonic()
    llm.stats_of_request = [STATS]
    llm.decisions = EVENTS
    llm.pieces = ["<tool_call>", '{"name": "add", "arguments": {}}', "</tool_call>"]
    provider = export_to(collector.url)
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL], "stream": stream}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    async with served(llm, provider) as (http, tracing):
        answer = await http.post("/v1/chat/completions", json=body, headers=headers)
        await tracing.settle()
    assert answer.status_code == 200
    await asyncio.to_thread(provider.shutdown)
    by_name = {span.name: span for span in collector.spans}
    root = by_name["chat scripted"]
    assert root.parent_span_id.hex() == PARENT
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert by_name.keys() == {"chat scripted", "queue", "prefill", "preempted", "decode", "tool_parse"}
    assert all(span.parent_span_id == root.span_id for span in collector.spans if span is not root)
    [calls] = [each.value.int_value for each in by_name["tool_parse"].attributes]
    assert calls == 1
    wall = time.time_ns() - (time.monotonic_ns() - int(1e9 * now))
    assert abs(root.start_time_unix_nano - wall) < 60e9


async def test_serving_goes_on_while_the_collector_is_away(llm: Any) -> None:
    provider = export_to("http://127.0.0.1:9/v1/traces")
    async with served(llm, provider) as (http, tracing):
        answers = [await http.post("/v1/completions", json={"prompt": "Hi"}) for _ in range(20)]
        await tracing.settle()
    assert {answer.status_code for answer in answers} == {200}
    await asyncio.to_thread(provider.shutdown)
