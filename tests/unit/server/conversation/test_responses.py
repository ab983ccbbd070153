"""/v1/responses through the official client."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pydantic
import pytest
from fastapi import FastAPI
from openai.types.responses import Response, ResponseStreamEvent
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenmill.errors import EngineError, RequestError
from tokenmill.server.app import create_app
from tokenmill.server.config import KeepConfig, ServerConfig
from tokenmill.server.observability.metrics import Metrics
from tokenmill.server.principal import Principal
from tokenmill.types import ErrorInfo, FinishReason

TOOL: Any = {
    "type": "function",
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def config(config: ServerConfig) -> ServerConfig:
    return dataclasses.replace(config, tool_parser="hermes", reasoning_parser="think_tags", max_body_mib=1.0)


def ask(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    return client.responses.create(**{"model": "scripted", "input": "Hi", **fields})


class Machine:
    """What may follow what in a stream; raises at the first event that may not."""

    def __init__(self) -> None:
        self.expected = 0
        self.state = "new"
        self.items: list[dict[str, Any]] = []
        self.open: dict[str, Any] | None = None
        self.part = ""
        self.grown = ""
        self.response: dict[str, Any] = {}

    def feed(self, event: dict[str, Any]) -> None:
        EVENT.validate_python(event, strict=True)
        assert event["sequence_number"] == self.expected
        self.expected += 1
        assert self.state != "ended"
        kind = event["type"].removeprefix("response.")
        if kind in ("created", "queued", "in_progress", "completed", "incomplete", "failed"):
            self._lifecycle(kind, event["response"])
            return
        assert self.state == "in_progress"
        if kind == "output_item.added":
            assert self.open is None
            assert event["output_index"] == len(self.items)
            assert event["item"]["status"] == "in_progress"
            self.open, self.part, self.grown = event["item"], "none", ""
            return
        assert self.open is not None
        assert event["output_index"] == len(self.items)
        if kind == "output_item.done":
            item = event["item"]
            assert (item["id"], item["type"]) == (self.open["id"], self.open["type"])
            assert self.part == ("done" if item["type"] == "function_call" else "closed")
            text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
            assert text == self.grown
            self.items.append(item)
            self.open = None
            return
        assert event["item_id"] == self.open["id"]
        of = {
            "message": "output_text",
            "reasoning": "reasoning_text",
            "function_call": "function_call_arguments",
        }[self.open["type"]]
        if kind == "content_part.added":
            assert (self.part, event["part"]["type"], event["part"]["text"]) == ("none", of, "")
            self.part = "open"
        elif kind == f"{of}.delta":
            assert self.part == "open" or (self.part == "none" and of == "function_call_arguments")
            assert event["delta"]
            self.grown += event["delta"]
        elif kind == f"{of}.done":
            assert event["arguments" if of == "function_call_arguments" else "text"] == self.grown
            self.part = "done"
        else:
            assert kind == "content_part.done"
            assert (self.part, event["part"]["text"]) == ("done", self.grown)
            self.part = "closed"

    def _lifecycle(self, kind: str, response: dict[str, Any]) -> None:
        Response.model_validate(response)
        before = {"created": ("new",), "queued": ("created",), "in_progress": ("created", "queued")}
        assert self.state in before.get(kind, ("in_progress", "queued"))
        if kind in ("completed", "incomplete", "failed"):
            assert self.open is None or kind == "failed" or response["status"] == "cancelled"
            assert response["output"][: len(self.items)] == self.items
            assert all(item["status"] != "in_progress" for item in response["output"])
            assert response["status"] == kind or (response["status"], kind) == ("cancelled", "incomplete")
            self.response = response
            self.state = "ended"
        else:
            assert response["output"] == []
            self.state = kind


def events_of(text: str) -> list[dict[str, Any]]:
    events = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def run_machine(events: list[dict[str, Any]]) -> Machine:
    machine = Machine()
    for event in events:
        machine.feed(event)
    assert machine.state == "ended"
    return machine


async def test_answer(client: openai.AsyncOpenAI, llm: Any) -> None:
    answer = await ask(client, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5, max_output_tokens=99)
    assert (answer.object, answer.status, answer.output_text) == ("response", "completed", "Hello world")
    assert (answer.instructions, answer.metadata, answer.temperature, answer.top_p) == ("Be brief.", {"a": "b"}, 0.5, 1)
    [message] = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    prompt = llm.tokenizer.encode("<system>Be brief.<user>Hi<assistant>")
    assert llm.calls[0].prompt == prompt
    assert (llm.calls[0].params.temperature, llm.calls[0].params.max_tokens) == (0.5, 99)
    generated = sum(len(llm.tokenizer.encode(piece)) for piece in llm.pieces)
    assert answer.usage.input_tokens == len(prompt)
    assert answer.usage.input_tokens_details.cached_tokens == len(prompt) // 2
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (generated, generated + len(prompt))
    assert await client.responses.retrieve(answer.id) == answer


SCRIPTS: list[tuple[list[str], list[str]]] = [
    (["Hel", "lo"], ["message"]),
    ([], ["message"]),
    (["<think>Hm", "m.</think>Yes", "."], ["reasoning", "message"]),
    (["<think>Hmm."], ["reasoning"]),
    ([CALL], ["function_call"]),
    ([*CALL], ["function_call"]),
    ([CALL, "\n", CALL], ["function_call", "function_call"]),
    (["<think>a</think>", "I add. ", CALL], ["reasoning", "message", "function_call"]),
    (['<tool_call>{"name": "add", "arg'], ["message"]),
]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("pieces", "kinds"), SCRIPTS)
async def test_events_come_in_order_and_add_up_to_the_answer(
    http: httpx2.AsyncClient, llm: Any, pieces: list[str], kinds: list[str], background: bool
) -> None:
    llm.pieces = pieces or [""]
    body = {"input": "Hi", "tools": [TOOL], "background": background}
    streamed = await http.post("/v1/responses", json=body | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    machine = run_machine(events_of(streamed.text))
    assert [item["type"] for item in machine.items] == kinds
    assert machine.response["status"] == "completed"
    whole = (await http.post("/v1/responses", json=body | {"background": False})).json()
    assert _plain(whole["output"]) == _plain(machine.response["output"])
    assert {**whole["usage"]} == machine.response["usage"]
    kept = (await http.get(f"/v1/responses/{machine.response['id']}")).json()
    assert kept == machine.response


def _plain(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**item, "id": "", "call_id": ""} for item in output]


@pytest.mark.parametrize("pieces", [["Hel", "lo"], ["<think>a"], [CALL]])
async def test_an_answer_that_is_cut_off_is_incomplete(http: httpx2.AsyncClient, llm: Any, pieces: list[str]) -> None:
    llm.pieces, llm.finish = pieces, FinishReason.LENGTH
    streamed = await http.post("/v1/responses", json={"input": "Hi", "tools": [TOOL], "stream": True})
    machine = run_machine(events_of(streamed.text))
    assert machine.response["status"] == "incomplete"
    assert machine.response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert machine.items[-1]["status"] == "incomplete"


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    "failure", [ErrorInfo("nan", "Not a number."), EngineError("engine_dead", "It died."), ValueError("a mistake")]
)
async def test_an_error_in_mid_stream_is_the_last_event(
    http: httpx2.AsyncClient, llm: Any, failure: Any, background: bool
) -> None:
    llm.failure = failure
    streamed = await http.post("/v1/responses", json={"input": "Hi", "stream": True, "background": background})
    assert streamed.status_code == 200
    machine = run_machine(events_of(streamed.text))
    code = {ErrorInfo: "nan", EngineError: "engine_dead", ValueError: "internal_error"}[type(failure)]
    assert machine.response["status"] == "failed"
    assert (machine.response["error"]["code"], machine.response["error"]["type"]) == ("server_error", code)
    assert (await http.get(f"/v1/responses/{machine.response['id']}")).json() == machine.response


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_event_is_an_error_answer(
    http: httpx2.AsyncClient, llm: Any, stream: bool
) -> None:
    llm.refusal = RequestError("prompt_too_long", "Too long.", "prompt")
    answer = await http.post("/v1/responses", json={"input": "Hi", "stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "prompt_too_long")


async def test_a_whole_answer_that_fails_is_an_error_answer(http: httpx2.AsyncClient, llm: Any) -> None:
    llm.failure = EngineError("engine_dead", "It died.")
    answer = await http.post("/v1/responses", json={"input": "Hi"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_dead")


async def test_a_stream_whose_client_leaves_is_aborted(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.endless = True
    stream = await ask(client, stream=True)
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    assert (await llm.ended.get())[1]


async def test_the_clients_stream_helper(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.pieces = ["<think>a</think>", "Sum: ", CALL]
    async with client.responses.stream(model="scripted", input="Hi", tools=[TOOL]) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_response()
    assert {"response.reasoning_text.delta", "response.output_text.delta", "response.completed"} <= kinds
    assert final.output_text == "Sum: "
    assert final.output[-1].type == "function_call"
    assert json.loads(final.output[-1].arguments) == {"a": 1}


async def test_the_sync_client(url: str) -> None:
    def talk() -> tuple[str, list[str]]:
        with openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
            whole = client.responses.create(model="scripted", input="Hi")
            with client.responses.stream(model="scripted", input="Hi", previous_response_id=whole.id) as stream:
                return whole.output_text, [event.type for event in stream]

    text, kinds = await asyncio.to_thread(talk)
    assert (text, kinds[0], kinds[-1]) == ("Hello world", "response.created", "response.completed")


async def test_logprobs(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.pieces = ["<think>a</think>", "b", "c"]
    answer = await ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    [_, message] = answer.output
    assert [entry.token for entry in message.content[0].logprobs] == ["b", "c"]
    assert [len(entry.top_logprobs) for entry in message.content[0].logprobs] == [2, 2]


async def test_items_are_shown_as_messages(client: openai.AsyncOpenAI, llm: Any) -> None:
    await ask(
        client,
        instructions="One.",
        input=[
            {"role": "developer", "content": "Two."},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
            {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "2"},
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "3"}]},
            {"role": "system", "content": "Late."},
        ],
    )
    shown = llm.tokenizer.decode(llm.calls[0].prompt)
    assert shown == "<system>One.\n\nTwo.<user>a\nb<assistant>c<tool>2<tool>3<system>Late.<assistant>"


async def test_a_conversation_goes_on_by_id(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.pieces = ["<think>hm</think>", "one", CALL]
    first = await ask(client, instructions="Only now.", tools=[TOOL])
    call = first.output[-1]
    llm.pieces = ["two"]
    outputs: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "42"}]
    second = await ask(client, previous_response_id=first.id, input=outputs)
    assert second.previous_response_id == first.id
    assert llm.tokenizer.decode(llm.calls[1].prompt) == "<user>Hi<assistant>one<tool>42<assistant>"
    await ask(client, previous_response_id=second.id, input="More")
    assert (
        llm.tokenizer.decode(llm.calls[2].prompt) == "<user>Hi<assistant>one<tool>42<assistant>two<user>More<assistant>"
    )
    items = [item async for item in client.responses.input_items.list(second.id, order="asc", limit=2)]
    assert [item.type for item in items] == ["message", "reasoning", "message", "function_call", "function_call_output"]
    newest = await client.responses.input_items.list(second.id, limit=2)
    assert [item.type for item in newest.data] == ["function_call_output", "function_call"]
    assert newest.has_more


async def test_what_is_not_stored_or_deleted_cannot_be_referred_to(client: openai.AsyncOpenAI) -> None:
    unstored = await ask(client, store=False)
    assert unstored.model_extra == {"store": False}
    stored = await ask(client)
    await client.responses.delete(stored.id)
    for response in (unstored, stored):
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError) as caught:
            await ask(client, previous_response_id=response.id)
        assert caught.value.param == "previous_response_id"


async def test_a_response_in_the_background_outlives_its_request(client: openai.AsyncOpenAI, llm: Any) -> None:
    go = asyncio.Event()
    served = llm.generate

    async def generate(prompt: Any, params: Any, **fields: Any) -> AsyncIterator[Any]:
        async for output in served(prompt, params, **fields):
            yield output
            await go.wait()

    llm.generate = generate
    answer = await ask(client, background=True)
    assert (answer.status, answer.output, answer.background) == ("queued", [], True)
    while answer.status == "queued":
        answer = await client.responses.retrieve(answer.id)
    assert answer.status == "in_progress"
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(client, previous_response_id=answer.id)
    assert caught.value.code == "invalid_state"
    go.set()
    while answer.status == "in_progress":
        answer = await client.responses.retrieve(answer.id)
    assert (answer.status, answer.output_text) == ("completed", "Hello world")


async def test_a_stream_in_the_background_can_be_left_and_joined_again(
    client: openai.AsyncOpenAI, http: httpx2.AsyncClient, llm: Any
) -> None:
    go = asyncio.Event()
    served = llm.generate

    async def generate(prompt: Any, params: Any, **fields: Any) -> AsyncIterator[Any]:
        async for output in served(prompt, params, **fields):
            yield output
            await go.wait()

    llm.generate = generate
    stream = await ask(client, background=True, stream=True)
    seen = []
    async for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    response_id = seen[0].response.id
    joined = await client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number)
    go.set()
    seen += [event async for event in joined]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    # What has ended is sent again, from wherever one wants.
    again = events_of((await http.get(f"/v1/responses/{response_id}?stream=true")).text)
    run_machine(again)
    assert [event["type"] for event in again] == [event.type for event in seen]
    late = events_of((await http.get(f"/v1/responses/{response_id}?stream=true&starting_after=4")).text)
    assert late == again[5:]


async def test_a_response_in_the_background_is_cancelled(
    client: openai.AsyncOpenAI, http: httpx2.AsyncClient, llm: Any
) -> None:
    llm.endless = True
    answer = await ask(client, background=True)
    while not (answer.output and answer.output_text == "Hello world"):
        answer = await client.responses.retrieve(answer.id)
    cancelled = await client.responses.cancel(answer.id)
    assert (cancelled.status, cancelled.output_text) == ("cancelled", "Hello world")
    assert (await llm.ended.get())[1]
    assert await client.responses.retrieve(answer.id) == cancelled
    assert await client.responses.cancel(answer.id) == cancelled
    machine = run_machine(events_of((await http.get(f"/v1/responses/{answer.id}?stream=true")).text))
    assert machine.response["status"] == "cancelled"


async def test_only_a_response_in_the_background_is_cancelled_or_streamed_again(client: openai.AsyncOpenAI) -> None:
    answer = await ask(client)
    with pytest.raises(openai.BadRequestError):
        await client.responses.cancel(answer.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.retrieve(answer.id, stream=True)
    assert caught.value.param == "stream"


async def test_deleting_a_response_gives_it_up(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.endless = True
    answer = await ask(client, background=True)
    while not llm.calls:
        await client.responses.retrieve(answer.id)
    await client.responses.delete(answer.id)
    assert (await llm.ended.get())[1]
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(answer.id)


async def test_what_a_killed_server_left_has_failed(
    client: openai.AsyncOpenAI, llm: Any, app: FastAPI, config: ServerConfig
) -> None:
    llm.endless = True
    answer = await ask(client, background=True)
    state = app.state.backlog._state
    stored = state.get("response", answer.id, "", "")
    await app.state.backlog.close()
    state.update(answer.id, stored.body, held=True)  # as it was when the process died
    state.close()
    other = create_app(llm, config, Metrics("x"))
    await other.state.backlog.start()
    found = await other.state.backlog.responses.get(answer.id, "")
    assert (found["status"], found["error"]["code"]) == ("failed", "server_error")
    await other.state.backlog.close()


async def test_a_server_can_keep_nothing(llm: Any, config: ServerConfig) -> None:
    app = create_app(llm, dataclasses.replace(config, keep=KeepConfig(keep_responses_days=0)), Metrics("x"))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://server") as http:
        answer = await http.post("/v1/responses", json={"input": "Hi"})
        assert (answer.status_code, answer.json()["store"]) == (200, False)
        answer = await http.post("/v1/responses", json={"input": "Hi", "background": True})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "background")
    assert not Path(config.store.state).exists()


async def test_truncation_drops_the_oldest_steps(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.max_model_len = 200
    old = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i} " * 20} for i in range(40)]
    await ask(client, instructions="Stay.", input=[*old, {"role": "user", "content": "Last."}], truncation="auto")
    shown = llm.tokenizer.decode(llm.calls[0].prompt)
    assert len(llm.calls[0].prompt) < 200
    assert shown.startswith("<system>Stay.")
    assert shown.endswith("<user>Last.<assistant>")
    assert "39 " in shown


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "missing_parameter"),
        ({"input": []}, "input", "missing_parameter"),
        ({"input": 7}, "input", "invalid_parameter"),
        ({"input": [7]}, "input", "invalid_parameter"),
        ({"input": [{}]}, "input[0].type", "unsupported_parameter"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "unsupported_parameter"),
        ({"input": [{"role": "king", "content": "a"}]}, "input[0].role", "invalid_parameter"),
        ({"input": [{"role": "user"}]}, "input[0].content", "invalid_parameter"),
        ({"input": [{"role": "user", "content": [7]}]}, "input[0].content[0]", "invalid_parameter"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "unsupported_parameter",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input[0].content[0].text",
            "invalid_parameter",
        ),
        ({"input": [{"role": "user", "content": "a", "id": 7}]}, "input[0].id", "invalid_parameter"),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "b"}]},
            "input[0].arguments",
            "invalid_parameter",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]},
            "input[0].call_id",
            "invalid_parameter",
        ),
        ({"input": [{"type": "reasoning", "content": [{}]}]}, "input[0].content[0].text", "invalid_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_parameter"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "x"}],
                },
            },
            "tool_choice.tools[0].name",
            "unknown_tool",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_parameter"),
        ({"max_tokens": 5}, "max_tokens", "unsupported_parameter"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"temperature": -1}, "temperature", "invalid_parameter"),
        ({"top_logprobs": 99}, "top_logprobs", "invalid_parameter"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type", "invalid_parameter"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing_parameter"),
        (
            {"text": {"format": {"type": "json_object"}}, "guided_regex": "a"},
            "text.format",
            "invalid_parameter",
        ),
        ({"response_format": {"type": "text"}}, "response_format", "unsupported_parameter"),
        ({"conversation": "c"}, "conversation", "unsupported_parameter"),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"context_management": []}, "context_management", "unsupported_parameter"),
        ({"background": True, "store": False}, "background", "invalid_parameter"),
        ({"previous_response_id": "resp_none"}, "previous_response_id", "not_found"),
        ({"model": "other"}, "model", "model_not_found"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_parameter"),
        ({"inputs": "x"}, "inputs", "unknown_parameter"),
    ],
)
async def test_a_wrong_request_is_refused_with_its_field(
    http: httpx2.AsyncClient, llm: Any, fields: dict[str, Any], param: str, code: str
) -> None:
    answer = await http.post("/v1/responses", json={"input": "Hi", **fields})
    assert answer.status_code == (404 if code in ("not_found", "model_not_found") else 400)
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert llm.calls == []


async def test_a_format_reaches_the_engine_after_the_thoughts(client: openai.AsyncOpenAI, llm: Any) -> None:
    class Sum(pydantic.BaseModel):
        total: int

    llm.pieces = ['{"total"', ": 3}"]
    answer = await client.responses.parse(model="scripted", input="Hi", text_format=Sum)
    assert answer.output_parsed == Sum(total=3)
    assert answer.text.format.type == "json_schema"  # type: ignore[union-attr]
    [call] = llm.calls
    assert '"total"' in call.params.structured.grammar
    assert "think" in call.params.structured.grammar
    async with client.responses.stream(model="scripted", input="Hi", text_format=Sum) as stream:
        assert (await stream.get_final_response()).output_parsed == Sum(total=3)


async def test_a_tool_can_be_demanded(client: openai.AsyncOpenAI, llm: Any) -> None:
    other = {**TOOL, "name": "other"}
    await ask(client, tools=[TOOL, other], tool_choice={"type": "function", "name": "other"})
    await ask(
        client,
        tools=[TOOL, other],
        tool_choice={"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]},
    )
    await ask(client, tools=[TOOL, other], tool_choice="none")
    named, allowed, none = [call.params.structured for call in llm.calls]
    assert '"other' in named.grammar.replace("\\", "")
    assert '"add' not in named.grammar.replace("\\", "")
    assert '"other' not in allowed.grammar.replace("\\", "")
    assert none is None
    shown = [llm.tokenizer.decode(call.prompt).partition("<user>")[0] for call in llm.calls]
    assert shown == ["[add][other]", "[add]", ""]


async def test_the_cache_is_explained_on_request(client: openai.AsyncOpenAI) -> None:
    answer = await ask(client, extra_body={"cache_report": True})
    assert "cache_report" in answer.model_extra
    assert "cache_report" not in (await ask(client)).model_extra


class _Keys:
    """Stands for the access middleware: the key is the principal's id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = dict(scope["headers"])[b"authorization"].decode().split()[1]
        scope["state"]["principal"] = Principal(key_id=key)
        await self._app(scope, receive, send)


@pytest.fixture
def keyed(app: FastAPI) -> None:
    app.user_middleware.append(Middleware(_Keys))


@pytest.mark.usefixtures("keyed")
async def test_responses_belong_to_the_key_that_made_them(as_key: Any) -> None:
    async with as_key("anna") as anna, as_key("ben") as ben:
        mine = await ask(anna)
        running = await ask(anna, background=True)
        for asked in (
            ben.responses.retrieve,
            ben.responses.delete,
            ben.responses.cancel,
            ben.responses.input_items.list,
        ):
            for response in (mine, running):
                with pytest.raises(openai.NotFoundError):
                    await asked(response.id)
        with pytest.raises(openai.NotFoundError):
            await ask(ben, previous_response_id=mine.id)
        with pytest.raises(openai.NotFoundError):
            await ben.responses.retrieve(running.id, stream=True)
        with pytest.raises(openai.NotFoundError):
            await ben.responses.compact(model="scripted", previous_response_id=mine.id)
        assert (await anna.responses.retrieve(mine.id)).output_text == "Hello world"
