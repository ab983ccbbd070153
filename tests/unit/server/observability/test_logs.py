"""The log: a line per request, errors with their stack, and never what people wrote."""

import asyncio
import contextlib
import gc
import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from tokenmill.server.call import Call, Outcome
from tokenmill.server.config import ObserveConfig, ServerConfig
from tokenmill.server.observability.logs import Formatter, RequestLog, configure
from tokenmill.types import ErrorInfo, RequestStats, SamplingParams

MARK = "xyzzy-plugh"
STATS = RequestStats(
    arrival=10.0, scheduled=10.5, first_token=11.0, finished=12.0, prompt_tokens=3, generated_tokens=3,
    cached_tokens=1, recomputed_tokens=0, preemptions=0, misses={"cold": 2},
)  # fmt: skip
Connect = Callable[[ServerConfig], contextlib.AbstractAsyncContextManager[httpx2.AsyncClient]]


@contextlib.contextmanager
def logging_to(style: str, level: str = "debug", log_prompts: bool = False) -> Iterator[io.StringIO]:
    """Everything that is logged, as the server writes it."""
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in ("tokenmill", "uvicorn")]
    before = root.handlers[:], root.level, [logger.level for logger in loggers]
    configure(style, level, log_prompts)
    written = io.StringIO()
    assert isinstance(root.handlers[0], logging.StreamHandler)
    root.handlers[0].setStream(written)
    try:
        yield written
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        for logger, each in zip(loggers, before[2], strict=True):
            logger.setLevel(each)


def requests(written: io.StringIO) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    return [line for line in lines if line["message"] == "request"]


@pytest.mark.parametrize("stream", [False, True])
async def test_each_request_has_one_line_when_it_has_ended(llm: Any, http: httpx2.AsyncClient, stream: bool) -> None:
    llm.stats_of_request = [STATS]
    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    with logging_to("json") as written:
        await http.post(
            "/v1/completions",
            json={"prompt": "Hello", "stream": stream},
            headers={"x-request-id": "mine", "traceparent": parent},
        )
    [line] = requests(written)
    expected = {
        "level": "info", "request_id": "mine", "request": llm.calls[0].request_id, "endpoint": "/v1/completions",
        "method": "POST", "status": 200, "model": "scripted", "key_id": "", "finish": "stop", "error_code": "",
        "cached_tokens": len(llm.calls[0].prompt) // 2, "prompt_tokens": len(llm.calls[0].prompt),
        "queue_ms": 500.0, "ttft_ms": 1000.0, "trace_id": "ab" * 16,
    }  # fmt: skip
    assert {name: line.get(name) for name in expected} == expected
    assert line["generated_tokens"] > 0
    assert line["total_ms"] > 0


async def test_prompts_of_one_request_share_a_line(llm: Any, http: httpx2.AsyncClient) -> None:
    with logging_to("json") as written:
        await http.post("/v1/completions", json={"prompt": ["a", "b"]})
    [line] = requests(written)
    assert line["finish"] == "stop,stop"
    assert line["prompt_tokens"] == sum(len(call.prompt) for call in llm.calls)


async def test_refusals_have_a_line_with_their_code(http: httpx2.AsyncClient) -> None:
    with logging_to("json", "info") as written:
        await http.post("/v1/completions", content=b"{")
        await http.post("/v1/completions", json={"prompt": "a", "model": "other"})
        await http.get("/metrics")  # only looks
    lines = requests(written)
    assert [line["status"] for line in lines] == [400, 404]
    assert all(line["error_code"] and line["request_id"] for line in lines)


async def test_a_failure_in_mid_stream_has_its_code(llm: Any, http: httpx2.AsyncClient) -> None:
    llm.failure = ErrorInfo("out_of_memory", "none left")
    with logging_to("json") as written:
        await http.post("/v1/completions", json={"prompt": "a", "stream": True})
    [line] = requests(written)
    assert (line["status"], line["error_code"], line["finish"]) == (200, "out_of_memory", "error")


def test_a_call_without_an_http_request_gets_its_own_line() -> None:
    call = Call(request_id="batch-1", endpoint="/v1/completions", model="m", prompt="", params=SamplingParams())
    with logging_to("json") as written:
        RequestLog().end(call, Outcome(("stop",), "", 3, 1, 3, (STATS,), 2.0))
    [line] = requests(written)
    assert (line["request"], line["total_ms"], line["ttft_ms"]) == ("batch-1", 2000.0, 1000.0)


BODIES: list[tuple[str, Any]] = [
    ("/v1/completions", {"prompt": MARK}),
    ("/v1/completions", {"prompt": MARK, "stream": True}),
    ("/v1/completions", {"prompt": MARK, "max_tokens": MARK}),
    ("/v1/completions", {"prompt": {"odd": MARK}}),
    ("/v1/completions", {"prompt": "a", "stop": [MARK] * 99}),
    ("/v1/completions", {"prompt": "a", "model": MARK}),
    ("/v1/completions", {"prompt": "a", "user": MARK, MARK: MARK}),
    ("/v1/completions", f'{{"prompt": "{MARK}'),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": MARK}]}),
    ("/v1/chat/completions", {"messages": [{"role": MARK, "content": MARK}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": MARK, "text": MARK}]}]}),
    ("/v1/chat/completions", {"messages": MARK}),
    ("/v1/messages", {"model": "scripted", "max_tokens": 5, "messages": [{"role": "user", "content": MARK}]}),
    ("/v1/messages", {"model": "scripted", "max_tokens": 5, "messages": [{"role": "user", "content": {MARK: 1}}]}),
]


@pytest.mark.parametrize("style", ["text", "json"])
async def test_what_people_and_models_wrote_is_in_no_log(llm: Any, http: httpx2.AsyncClient, style: str) -> None:
    llm.pieces = [MARK, " ", MARK]
    failures: list[Any] = [None, KeyError(MARK), ErrorInfo("engine_failed", MARK), ValueError(MARK)]
    with logging_to(style) as written:
        for failure in failures:
            llm.failure = failure
            for path, body in BODIES:
                content = body if isinstance(body, str) else json.dumps(body)
                await http.post(path, content=content, headers={"content-type": "application/json"})

        async def fail() -> None:
            raise RuntimeError(MARK)

        task = asyncio.ensure_future(fail())
        await asyncio.wait([task])
        del task
        gc.collect()
        logging.getLogger("some.library").warning("cannot read %r", MARK)
    text = written.getvalue()
    assert text.count("internal_error") >= 2
    assert "KeyError" in text
    assert "Task exception was never retrieved" in text
    assert "cannot read" in text
    assert MARK not in text


async def test_prompts_are_logged_when_that_is_switched_on(connect: Connect) -> None:
    config = ServerConfig(observe=ObserveConfig(log_prompts=True))
    with logging_to("json", "info", log_prompts=True) as written:
        async with connect(config) as http:
            await http.post("/v1/completions", json={"prompt": MARK})
        logging.getLogger("some.library").warning("cannot read %r", MARK)
    assert written.getvalue().count(MARK) == 2


@pytest.mark.parametrize("style", ["text", "json"])
async def test_an_error_says_which_request_and_where(llm: Any, http: httpx2.AsyncClient, style: str) -> None:
    llm.failure = ZeroDivisionError("never told")
    with logging_to(style) as written:
        answer = await http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    [line] = [line for line in written.getvalue().splitlines() if " failed" in line]
    assert "mine" in line
    assert "ZeroDivisionError" in written.getvalue()
    assert "conftest.py:" in written.getvalue()
    assert "never told" not in written.getvalue()


def line_of(style: str, message: str, *arguments: Any, name: str = "tokenmill.x", **fields: Any) -> str:
    record = logging.LogRecord(name, logging.INFO, "", 0, message, arguments, None)
    record.created = 0.1239
    record.fields = fields
    return Formatter(style).format(record)


def test_text_lines_cannot_be_forged() -> None:
    line = line_of("text", "request", user='a b="c"\nlevel=error', n=3, ok=True, plain="x/y")
    head = "1970-01-01T00:00:00.123Z info request logger=tokenmill.x"
    assert line == head + ' user="a b=\\"c\\"\\nlevel=error" n=3 ok=true plain=x/y'


def test_json_lines() -> None:
    assert json.loads(line_of("json", "%d things", 2, name="uvicorn.error", a=[1])) == {
        "time": "1970-01-01T00:00:00.123Z", "level": "info", "logger": "uvicorn.error", "message": "2 things", "a": [1],
    }  # fmt: skip


def test_libraries_are_heard_from_warnings_on() -> None:
    with logging_to("text", "debug") as written:
        logging.getLogger("httpx").info("quiet")
        logging.getLogger("httpx").warning("loud")
        logging.getLogger("uvicorn.error").info("served")
    assert "quiet" not in written.getvalue()
    assert "loud" in written.getvalue()
    assert "served" in written.getvalue()
