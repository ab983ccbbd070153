"""OpenTelemetry traces: a span per call with what the engine did to it as its children, sent by OTLP over HTTP.

The engine records its decisions anyway. They are asked for when a traced call has ended, beside the requests that go
on, and become spans with the times at which they were taken.

Source: https://github.com/open-telemetry/semantic-conventions-genai (attributes), https://www.w3.org/TR/trace-context/
(the parent); ``gen_ai.latency.*`` and ``gen_ai.request.id`` are vLLM's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

import tokenmill
from tokenmill.engine.events import Event
from tokenmill.server.call import Call, Outcome
from tokenmill.server.observability.record import current
from tokenmill.types import RequestStats

__all__ = ["Tracing", "export_to"]

_QUEUE = 8192
"""Spans that wait to be sent. Those beyond are dropped: a collector that is away costs memory for these, no more."""
_EXPORT_MS = 5000
"""How long sending a batch may take."""
_MOST_ASKED = 64
"""Calls whose events are asked for at once. A call that ends beyond gets its span without children."""

_OPERATIONS = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
"""Operations by endpoint; all others are ``chat``."""

_logger = logging.getLogger(__name__)
_w3c = TraceContextTextMapPropagator()


def export_to(endpoint: str) -> TracerProvider:
    """A provider that sends spans to `endpoint` from a thread of its own.

    What the SDK reads from the environment (OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_HEADERS and so
    on) holds; without it each request is traced unless its traceparent says that it is not sampled.
    """
    about = {"service.name": "tokenmill", "service.version": tokenmill.__version__}
    provider = TracerProvider(resource=Resource(about).merge(Resource.create()), shutdown_on_exit=True)
    exporter = OTLPSpanExporter(endpoint, timeout=_EXPORT_MS / 1000)
    provider.add_span_processor(BatchSpanProcessor(exporter, _QUEUE, export_timeout_millis=_EXPORT_MS))
    return provider


class Tracing:
    """An interceptor that makes the spans of calls.

    Args:
        provider: where spans go.
        events: asks the engine for its decisions about one of its requests.
    """

    def __init__(self, provider: TracerProvider, events: Callable[[str], Awaitable[Sequence[Event]]]) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("tokenmill", tokenmill.__version__)
        self._events = events
        self._open: dict[str, Span] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._epoch = time.time_ns() - time.monotonic_ns()
        """The wall clock when the monotonic one began."""

    async def begin(self, call: Call) -> None:
        """Starts the span, and makes it the parent of whatever else traces this call."""
        parent = _w3c.extract(call.trace)
        name = f"{_operation(call)} {call.model}"
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, _asked(call))
        self._open[call.request_id] = span
        here = set_span_in_context(span)
        carrier: dict[str, str] = {}
        _w3c.inject(carrier, here)
        call.trace = carrier
        record = current()
        if record is not None and span.is_recording():
            record.on_parse = lambda start, end, calls: self._child(
                span, "tool_parse", start, end, {"tokenmill.tool_calls": calls}
            )

    def end(self, call: Call, outcome: Outcome) -> None:
        """Ends the span; its children follow when the engine has told about them."""
        span = self._open.pop(call.request_id, None)
        if span is None or not span.is_recording():
            return
        span.set_attributes(_answered(call, outcome))
        if outcome.error_code:
            span.set_attribute("error.type", outcome.error_code)
            span.set_status(Status(StatusCode.ERROR))
        span.end()
        served = outcome.stats or ("abort" in outcome.finish_reasons and not outcome.error_code)
        if served and len(self._tasks) < _MOST_ASKED:
            task = asyncio.ensure_future(self._tell(call, outcome, span))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Waits until the children of all calls that have ended are made."""
        await asyncio.gather(*self._tasks)

    async def _tell(self, call: Call, outcome: Outcome, span: Span) -> None:
        n = call.params.n
        ids = [call.request_id] if n == 1 else [f"{call.request_id}/{index}" for index in range(n)]
        try:
            for number, request_id in enumerate(ids):
                events = await self._events(request_id)
                for name, start, end, attributes in _stages(events, _stats_of(events, outcome.stats)):
                    if n > 1:
                        attributes["tokenmill.completion"] = number
                    self._child(span, name, start, end, attributes)
        except Exception as error:
            _logger.warning("request %s is traced without stages: %s", call.request_id, type(error).__name__)

    def _child(
        self, parent: Span, name: str, start: float, end: float, attributes: Mapping[str, AttributeValue]
    ) -> None:
        context = set_span_in_context(parent)
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=self._wall(start))
        span.end(self._wall(max(start, end)))

    def _wall(self, monotonic: float) -> int:
        return self._epoch + int(monotonic * 1e9)


def _operation(call: Call) -> str:
    return _OPERATIONS.get(call.endpoint, "chat")


def _asked(call: Call) -> dict[str, AttributeValue]:
    """What the request says. Nothing of the prompt's content."""
    params = call.params
    asked: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": _operation(call),
        "gen_ai.provider.name": "tokenmill",
        "gen_ai.request.model": call.model,
        "gen_ai.request.id": call.request_id,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.n": params.n,
        "gen_ai.request.stream": call.delta,
        "url.path": call.endpoint,
        "enduser.id": call.principal.key_id or None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _answered(call: Call, outcome: Outcome) -> dict[str, AttributeValue]:
    """How the call went."""
    told: dict[str, AttributeValue] = {
        "gen_ai.response.id": call.request_id,
        "gen_ai.response.model": call.model,
        "gen_ai.response.finish_reasons": [str(reason) for reason in outcome.finish_reasons],
        "gen_ai.usage.input_tokens": outcome.prompt_tokens,
        "gen_ai.usage.output_tokens": outcome.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": outcome.cached_tokens,
        "gen_ai.usage.prompt_tokens": outcome.prompt_tokens,
        "gen_ai.usage.completion_tokens": outcome.completion_tokens,
        "gen_ai.latency.e2e": outcome.seconds,
    }
    for stats in outcome.stats[:1]:
        if stats.scheduled is not None:
            told["gen_ai.latency.time_in_queue"] = stats.scheduled - stats.arrival
            told["gen_ai.latency.time_in_model_inference"] = stats.finished - stats.scheduled
        if stats.scheduled is not None and stats.first_token is not None:
            told["gen_ai.latency.time_in_model_prefill"] = stats.first_token - stats.scheduled
        if stats.first_token is not None:
            told["gen_ai.latency.time_to_first_token"] = stats.first_token - stats.arrival
            told["gen_ai.response.time_to_first_chunk"] = stats.first_token - stats.arrival
            told["gen_ai.server.time_to_first_token"] = stats.first_token - stats.arrival
            told["gen_ai.latency.time_in_model_decode"] = stats.finished - stats.first_token
        told |= {f"tokenmill.miss.{reason}": tokens for reason, tokens in stats.misses.items()}
    return told


def _stats_of(events: Sequence[Event], stats: Sequence[RequestStats]) -> RequestStats | None:
    """The statistics of the completion that the events are about: it ended when they say so."""
    ends = [event.time for event in events if event.action == "finish"]
    return min(stats, key=lambda each: abs(each.finished - ends[-1])) if ends and stats else None


_Stage = tuple[str, float, float, dict[str, AttributeValue]]


def _stages(events: Sequence[Event], stats: RequestStats | None) -> Iterator[_Stage]:
    """What happened to one request, as spans: name, start, end and attributes.

    A step computes a chunk from the event's time to the next event of the request, which is in the next step at the
    earliest; the last chunk of a prompt ends with the first token.
    """
    if not events:
        return
    last = events[-1].time
    first_token = last if stats is None or stats.first_token is None else stats.first_token
    waits, since, pending = "queue", events[0].time, 0
    why: dict[str, AttributeValue] = {}
    for number, event in enumerate(events):
        following = events[number + 1].time if number + 1 < len(events) else last
        if event.action == "preempt":
            waits, since, pending, why = "preempted", event.time, 0, {"tokenmill.reason": event.reason}
        elif event.action == "defer":
            why["tokenmill.reason"] = event.reason
        elif event.action == "hit":
            why["tokenmill.cached_tokens"] = event.tokens
        elif event.action in ("admit", "resume"):
            yield waits, since, event.time, why | {"tokenmill.tokens_to_compute": event.tokens}
            waits, pending = "", event.tokens
        elif event.action == "chunk" and pending > 0:
            again = event.time > first_token
            pending -= event.tokens
            end = following if pending > 0 or again else min(first_token, last)
            yield "prefill", event.time, end, {"tokenmill.tokens": event.tokens, "tokenmill.recompute": again}
    if waits:
        yield waits, since, last, why
    if events[-1].action == "finish" and stats is not None and stats.first_token is not None:
        steps = sum(event.action == "chunk" and event.time >= first_token for event in events)
        yield "decode", first_token, last, {
            "tokenmill.tokens": stats.generated_tokens, "tokenmill.steps": steps
        }  # fmt: skip
