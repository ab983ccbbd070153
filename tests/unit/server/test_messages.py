"""POST /v1/messages through Anthropic's own client."""

import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx2
import pytest

from tokenmill.errors import EngineError
from tokenmill.server.service import Service
from tokenmill.types import FinishReason

TOOL = {
    "name": "f",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
ASK: Any = {"model": "scripted", "max_tokens": 64, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
async def claude(url: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def speaks_hermes(app: Any) -> None:
    """The scripted model writes tool calls as Hermes does, and thinks aloud."""
    service: Service = app.state.service
    app.state.service = dataclasses.replace(service, parsers=("hermes", "think_tags"))


async def test_answer(claude: anthropic.AsyncAnthropic, llm: Any) -> None:
    answer = await claude.messages.create(
        **ASK, system="Be brief.", stop_sequences=["END"], extra_body={"temperature": 0.5, "top_k": 3}
    )
    [block] = answer.content
    assert (block.type, block.text) == ("text", "Hello world")
    assert (answer.role, answer.stop_reason, answer.model, answer.id[:4]) == (
        "assistant",
        "end_turn",
        "scripted",
        "msg_",
    )
    params = llm.calls[0].params
    assert (params.max_tokens, params.stop, params.temperature, params.top_k) == (64, ["END"], 0.5, 3)
    assert llm.tokenizer.decode(llm.calls[0].prompt) == "<system>Be brief.<user>Hi<assistant>"


async def test_cached_tokens_stand_beside_the_others(claude: anthropic.AsyncAnthropic, llm: Any) -> None:
    usage = (await claude.messages.create(**ASK)).usage
    prompt = len(llm.calls[0].prompt)
    assert usage.cache_read_input_tokens == prompt // 2
    assert usage.input_tokens == prompt - prompt // 2
    assert usage.output_tokens == sum(len(llm.tokenizer.encode(piece)) for piece in llm.pieces)
    counted = await claude.messages.count_tokens(model="scripted", messages=ASK["messages"])
    assert counted.input_tokens == prompt


@pytest.mark.parametrize(("reason", "expected"), [(FinishReason.LENGTH, "max_tokens"), (FinishReason.STOP, "end_turn")])
async def test_why_it_stopped(claude: anthropic.AsyncAnthropic, llm: Any, reason: FinishReason, expected: str) -> None:
    llm.finish = reason
    assert (await claude.messages.create(**ASK)).stop_reason == expected


@pytest.mark.usefixtures("speaks_hermes")
async def test_thoughts_and_tool_calls_are_blocks(claude: anthropic.AsyncAnthropic, llm: Any) -> None:
    llm.pieces = ["<think>Hm", "m</think>I call. ", CALL[:20], CALL[20:]]
    answer = await claude.messages.create(**ASK, tools=[TOOL])
    kinds = [block.type for block in answer.content]
    assert kinds == ["thinking", "text", "tool_use"]
    thought, text, call = answer.content
    assert (thought.thinking, text.text.strip(), call.name, call.input) == ("Hmm", "I call.", "f", {"a": 1})
    assert answer.stop_reason == "tool_use"


@pytest.mark.usefixtures("speaks_hermes")
async def test_a_stream_adds_up_to_the_same_message(claude: anthropic.AsyncAnthropic, llm: Any) -> None:
    llm.pieces = ["<think>Hm", "m</think>I call. ", CALL[:20], CALL[20:]]
    whole = await claude.messages.create(**ASK, tools=[TOOL])
    async with claude.messages.stream(**ASK, tools=[TOOL]) as stream:
        events = [event.type async for event in stream]
        message = await stream.get_final_message()

    def plain(answer: Any) -> Any:
        return (
            [block.model_dump(exclude={"id"}) for block in answer.content],
            answer.stop_reason,
            answer.usage.output_tokens,
        )

    assert plain(message) == plain(whole)
    assert events.count("content_block_start") == events.count("content_block_stop") == 3
    assert events[0] == "message_start"
    assert events[-1] == "message_stop"


async def test_a_conversation_with_results_of_calls_reaches_the_template(
    claude: anthropic.AsyncAnthropic, llm: Any
) -> None:
    turns: Any = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "text", "text": "I call."}, {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "2"}]},
            {"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}},
        ]},
    ]  # fmt: skip
    await claude.messages.create(model="scripted", max_tokens=4, messages=turns, tools=[TOOL])
    shown = llm.tokenizer.decode(llm.calls[0].prompt)
    assert shown == "[f]<user>one\ntwo<assistant>I call.<tool>2<user>go on<assistant>"


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"model": "other"}, anthropic.NotFoundError, "other"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"messages": []}, anthropic.BadRequestError, "messages"),
        ({"tool_choice": {"type": "any"}}, anthropic.BadRequestError, "tools"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            anthropic.BadRequestError,
            "content",
        ),
    ],
)
async def test_refusals_are_in_anthropics_form(
    claude: anthropic.AsyncAnthropic, fields: Any, kind: Any, words: str
) -> None:
    with pytest.raises(kind) as caught:
        await claude.messages.create(**(ASK | fields))
    assert caught.value.body["type"] == "error"
    assert words in caught.value.body["error"]["message"]


async def test_a_failure_in_mid_stream_is_an_error_event(http: httpx2.AsyncClient, llm: Any) -> None:
    llm.failure = EngineError("engine_died", "Gone.")
    answer = await http.post("/v1/messages", json=ASK | {"stream": True})
    last = answer.text.strip().split("\n\n")[-1]
    name, data = last.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"] == {
        "type": "api_error",
        "message": "Gone.",
        "code": "engine_died",
    }
