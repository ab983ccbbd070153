"""What clients get when something is wrong: a status, a stable code, the field, and never a traceback."""

import json
import logging
from typing import Any

import httpx2
import openai
import pytest

from tokenmill.errors import EngineError, ModelError, RequestError, UnavailableError
from tokenmill.server.errors import body_of, status_of
from tokenmill.types import ErrorInfo

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("prompt_too_long", "m", "prompt"), 400, "invalid_request_error"),
        (RequestError("model_not_found", "m"), 404, "invalid_request_error"),
        (RequestError("body_too_large", "m"), 413, "invalid_request_error"),
        (UnavailableError("queue_full", "m"), 429, "rate_limit_error"),
        (UnavailableError("shutting_down", "m"), 503, "server_error"),
        (EngineError("engine_died", "m"), 500, "server_error"),
        (ModelError("anything", "m"), 500, "server_error"),
    ],
)
def test_status_and_body(error: Any, status: int, kind: str) -> None:
    assert status_of(error) == status
    assert body_of(error) == {"error": {"message": "m", "type": kind, "param": error.field, "code": error.code}}


@pytest.mark.parametrize(
    ("path", "fields", "code", "param"),
    [
        (CHAT, {"model": "other"}, "model_not_found", "model"),
        (CHAT, {"messages": None}, "invalid_parameter", "messages"),
        (CHAT, {"messages": []}, "invalid_parameter", "messages"),
        (CHAT, {"messages": [{"content": "x"}]}, "missing_parameter", "messages[0].role"),
        (CHAT, {"messages": [{"role": 1}]}, "invalid_parameter", "messages[0].role"),
        (CHAT, {"messages": [*MESSAGES, {"role": "user", "content": 5}]}, "unsupported_content", "messages[1].content"),
        (CHAT, {"temperature": "hot"}, "invalid_parameter", "temperature"),
        (CHAT, {"temperature": "0.5"}, "invalid_parameter", "temperature"),
        (CHAT, {"temperature": -1}, "invalid_parameter", "temperature"),
        (CHAT, {"top_p": 0}, "invalid_parameter", "top_p"),
        (CHAT, {"max_tokens": 0}, "invalid_parameter", "max_tokens"),
        (CHAT, {"max_tokens": 1.5}, "invalid_parameter", "max_tokens"),
        (CHAT, {"n": 0}, "invalid_parameter", "n"),
        (CHAT, {"n": 10**30}, "invalid_parameter", "n"),
        (CHAT, {"top_k": 10**30}, "invalid_parameter", "top_k"),
        (CHAT, {"seed": True}, "invalid_parameter", "seed"),
        (CHAT, {"stream": "yes"}, "invalid_parameter", "stream"),
        (CHAT, {"stop": 5}, "invalid_parameter", "stop"),
        (CHAT, {"stop": ["a", 5]}, "invalid_parameter", "stop"),
        (CHAT, {"stop": ""}, "invalid_parameter", "stop"),
        (CHAT, {"logit_bias": {"x": 1}}, "invalid_parameter", "logit_bias.x"),
        (CHAT, {"top_logprobs": 2}, "invalid_parameter", "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "invalid_parameter", "top_logprobs"),
        (CHAT, {"stream_options": {"include_usage": True}}, "invalid_parameter", "stream_options"),
        (CHAT, {"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
        (CHAT, {"stream": True, "prompt_logprobs": 1}, "unsupported_parameter", "prompt_logprobs"),
        (CHAT, {"temprature": 1}, "unknown_parameter", "temprature"),
        (CHAT, {"no-such": 1}, "unknown_parameter", "no-such"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "missing_parameter", "response_format.json_schema.schema"),
        (CHAT, {"guided_regex": "a", "guided_choice": ["b"]}, "invalid_parameter", "choice"),
        (CHAT, {"guided_regex": "a", "response_format": {"type": "json_object"}}, "invalid_parameter", "guided_regex"),
        (CHAT, {"tool_choice": "required"}, "invalid_parameter", "tool_choice"),
        (CHAT, {"functions": []}, "unsupported_parameter", "functions"),
        (CHAT, {"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "invalid_parameter", "chat_template_kwargs"),
        (COMPLETIONS, {"prompt": None}, "invalid_parameter", "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "invalid_parameter", "prompt"),
        (COMPLETIONS, {"prompt": []}, "empty_prompt", "prompt"),
        (COMPLETIONS, {"best_of": 3}, "unsupported_parameter", "best_of"),
        (COMPLETIONS, {"suffix": "x"}, "unsupported_parameter", "suffix"),
        (COMPLETIONS, {"max_tokens": 0}, "invalid_parameter", "max_tokens"),
        (COMPLETIONS, {"logprobs": True}, "invalid_parameter", "logprobs"),
    ],
)
async def test_bad_parameters_are_named(
    http: httpx2.AsyncClient, llm: Any, path: str, fields: dict[str, Any], code: str, param: str
) -> None:
    body = ({"messages": MESSAGES} if path == CHAT else {"prompt": "a"}) | fields
    answer = await http.post(path, json=body)
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    assert error["type"] == "invalid_request_error"
    assert llm.calls == []


async def test_a_misspelling_brings_a_suggestion(http: httpx2.AsyncClient) -> None:
    answer = await http.post(CHAT, json={"messages": MESSAGES, "temprature": 1})
    assert "Did you mean 'temperature'?" in answer.json()["error"]["message"]


async def test_missing_body_fields(http: httpx2.AsyncClient) -> None:
    error = (await http.post(COMPLETIONS, json={"model": "scripted"})).json()["error"]
    assert (error["code"], error["param"]) == ("missing_parameter", "prompt")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"prompt": "a",}',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 5000,
        b'{"prompt": ' + b"[" * 5000,
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_bodies_that_are_no_json_object(http: httpx2.AsyncClient, path: str, body: bytes) -> None:
    answer = await http.post(path, content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_body_too_large(http: httpx2.AsyncClient, llm: Any) -> None:
    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 1024

    for content in (b" " * 11_000, pieces()):
        answer = await http.post(COMPLETIONS, content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert llm.calls == []


async def test_unknown_paths_and_methods(http: httpx2.AsyncClient) -> None:
    answer = await http.get("/v2/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    answer = await http.get(CHAT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_refusals_before_the_first_token_have_their_status(
    http: httpx2.AsyncClient, llm: Any, path: str, stream: bool
) -> None:
    for error, status in (
        (RequestError("prompt_too_long", "Too long.", "prompt"), 400),
        (UnavailableError("shutting_down", "Bye."), 503),
        (EngineError("engine_died", "Dead."), 500),
    ):
        llm.refusal = error
        body = {"messages": MESSAGES} if path == CHAT else {"prompt": "a"}
        answer = await http.post(path, json=body | {"stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, error.code)
        assert ("retry-after" in answer.headers) == (status == 503)


async def test_official_client_raises_its_own_classes(client: openai.AsyncOpenAI, llm: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="scripted", prompt="a", extra_body={"unheard": 1})
    assert (bad.value.code, bad.value.param) == ("unknown_parameter", "unheard")
    llm.refusal = ValueError("a secret of ours")
    with pytest.raises(openai.InternalServerError) as broken:
        await client.completions.create(model="scripted", prompt="a")
    assert broken.value.code == "internal_error"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ErrorInfo("step_failed", "The step failed."), "step_failed"),
        (EngineError("engine_died", "Dead."), "engine_died"),
        (ValueError("a secret of ours"), "internal_error"),
    ],
)
async def test_failure_in_mid_stream_is_an_event_and_then_the_end(
    http: httpx2.AsyncClient, llm: Any, path: str, failure: Any, code: str
) -> None:
    llm.failure = failure
    body = {"messages": MESSAGES} if path == CHAT else {"prompt": "a"}
    answer = await http.post(path, json=body | {"stream": True})
    assert answer.status_code == 200
    *events, last = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
    assert all("choices" in event for event in events)
    assert last["error"]["code"] == code
    assert "secret" not in answer.text


async def test_official_client_sees_a_failure_in_mid_stream(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.failure = ErrorInfo("step_failed", "The step failed.")
    stream = await client.chat.completions.create(
        model="scripted", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    with pytest.raises(openai.APIError, match=r"The step failed\."):
        async for _ in stream:
            pass


async def test_engine_failure_without_stream(http: httpx2.AsyncClient, llm: Any) -> None:
    llm.failure = ErrorInfo("step_failed", "The step failed.")
    answer = await http.post(COMPLETIONS, json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "step_failed")


async def test_our_mistakes_are_logged_with_the_request_id_and_not_told(
    http: httpx2.AsyncClient, llm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    llm.refusal = ValueError("a secret of ours")
    with caplog.at_level(logging.ERROR):
        answer = await http.post(COMPLETIONS, json={"prompt": "a"}, headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["code"] == "internal_error"
    assert "mine" in error["message"]
    assert "secret" not in answer.text
    assert any("mine" in record.getMessage() and record.exc_info for record in caplog.records)


async def test_request_id_is_echoed_or_made(http: httpx2.AsyncClient) -> None:
    given = await http.get("/v1/models", headers={"x-request-id": "mine"})
    assert given.headers["x-request-id"] == "mine"
    first, second = [(await http.get("/nothing")).headers["x-request-id"] for _ in range(2)]
    assert first
    assert first != second
    silly = await http.get("/v1/models", headers={"x-request-id": "x" * 1000})
    assert len(silly.headers["x-request-id"]) < 100
