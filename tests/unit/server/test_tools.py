"""Tool calls, thoughts and structured output of chat completions, through the official client."""

import dataclasses
import json
from typing import Any

import httpx2
import openai
import pydantic
import pytest
from fastapi import FastAPI

from tokenmill.server.service import Service
from tokenmill.types import StructuredOutput

TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"a": {}}}}}
    for name in ("f", "g")
]
ASK: Any = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}
CALLS = [
    "<think>Hm",
    "m</think>Both. <tool_",
    'call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
]


@pytest.fixture
def app(app: FastAPI) -> FastAPI:
    """The scripted model writes tool calls as Hermes does, and thinks aloud."""
    service: Service = app.state.service
    app.state.service = dataclasses.replace(service, parsers=("hermes", "think_tags"))
    return app


async def test_calls_and_thoughts_have_fields_of_their_own(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.pieces = CALLS
    answer = await client.chat.completions.create(**ASK, tools=TOOLS)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.model_extra == {"reasoning_content": "Hmm"}
    assert (choice.message.content or "").strip() == "Both."
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]
    assert calls == [("f", {"a": 1}), ("g", {})]
    assert len({call.id for call in choice.message.tool_calls or ()}) == 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(llm.tokenizer.encode("Hmm"))


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_adds_up_to_the_same_calls(client: openai.AsyncOpenAI, llm: Any, n: int) -> None:
    llm.pieces = CALLS
    async with client.chat.completions.stream(**ASK, tools=TOOLS, n=n) as stream:
        async for _ in stream:
            pass
        answer = await stream.get_final_completion()
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert (choice.message.content or "").strip() == "Both."
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]
        assert calls == [("f", {"a": 1}), ("g", {})]
    assert len(answer.choices) == n


async def test_without_tools_calls_are_text(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.pieces = CALLS[2:]
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = await client.chat.completions.create(**ASK, **fields)
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content == "".join(CALLS[2:])


async def test_thoughts_can_be_left_out(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.pieces = CALLS
    answer = await client.chat.completions.create(**ASK, extra_body={"include_reasoning": False})
    assert not answer.choices[0].message.model_extra


async def test_malformed_calls_come_back_as_text(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.pieces = ['<tool_call>\n{"name": "f", "argu', "</tool_call> and more"]
    answer = await client.chat.completions.create(**ASK, tools=TOOLS)
    assert answer.choices[0].message.content == "".join(llm.pieces)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"f", "g"}), ({"type": "function", "function": {"name": "g"}}, {"g"})],
)
async def test_a_demanded_call_is_forced_by_a_grammar(
    client: openai.AsyncOpenAI, llm: Any, choice: Any, names: set[str]
) -> None:
    await client.chat.completions.create(**ASK, tools=TOOLS, tool_choice=choice)
    grammar = llm.calls[0].params.structured.grammar
    assert {name for name in ("f", "g") if f'\\"name\\": \\"{name}\\"' in grammar} == names


async def test_a_demanded_function_must_exist(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            **ASK, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "h"}}
        )
    assert (caught.value.code, caught.value.param) == ("unknown_tool", "tool_choice")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_regex": "a+"}, StructuredOutput(regex="a+")),
        ({"guided_json": {"type": "null"}}, StructuredOutput(json_schema='{"type": "null"}')),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, StructuredOutput(json_schema='{"type": "null"}')),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(choice=["a", "b"])),
        ({"guided_grammar": 'start: "a"'}, StructuredOutput(grammar='start: "a"')),
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
        ({"response_format": {"type": "text"}}, None),
    ],
)
async def test_every_way_to_ask_for_a_form_reaches_the_engine(
    http: httpx2.AsyncClient, llm: Any, fields: Any, expected: Any
) -> None:
    answer = await http.post("/v1/completions", json={"prompt": "Hi", **fields})
    assert answer.status_code == 200
    assert llm.calls[0].params.structured == expected


async def test_thoughts_may_come_before_an_answer_in_form(http: httpx2.AsyncClient, llm: Any) -> None:
    for fields in (
        {"guided_choice": ["a", "b"]},
        {"guided_regex": "a/b"},
        {"response_format": {"type": "json_object"}},
    ):
        await http.post("/v1/chat/completions", json=ASK | fields)
        grammar = llm.calls[-1].params.structured.grammar
        assert grammar.startswith("start: reasoning answer\n")
    assert "a\\/b" in llm.calls[1].params.structured.grammar
    await http.post("/v1/chat/completions", json=ASK | {"guided_json": "{"})
    assert llm.calls[-1].params.structured == StructuredOutput(json_schema="{")  # which the engine's side refuses


async def test_the_official_client_parses_an_answer_in_form(client: openai.AsyncOpenAI, llm: Any) -> None:
    class Person(pydantic.BaseModel):
        name: str
        age: int

    llm.pieces = ['{"name": "Ada",', ' "age": 36}']
    answer = await client.chat.completions.parse(**ASK, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36)
