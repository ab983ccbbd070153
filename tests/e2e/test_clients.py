"""Unmodified clients against a real server with the built-in model."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pydantic
import pytest

from tokenmill.models.folder import resolve

ASK = [{"role": "user", "content": "What is 217 + 145?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}}
]
TOOL_ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture
def client(demo_server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=demo_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, messages: Any = ASK, **more: Any) -> Any:
    return client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=64, **more)


def test_openai_answers_at_once_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    whole = chat(client)
    assert "362" in whole.choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


async def test_openai_async(demo_server: Any) -> None:
    async with openai.AsyncOpenAI(base_url=demo_server.url + "/v1", api_key="none", max_retries=0) as client:
        stream: Any = await client.chat.completions.create(
            model="demo",
            messages=ASK,
            temperature=0,
            stream=True,  # type: ignore[arg-type]
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert "362" in text


def test_openai_calls_a_tool_and_reads_its_result(client: openai.OpenAI) -> None:
    message = chat(client, TOOL_ASK, tools=TOOLS).choices[0].message
    [call] = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    history = [*TOOL_ASK, message.model_dump(exclude_none=True)]
    history.append({"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees."})
    assert chat(client, history, tools=TOOLS).choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_openai_forces_a_call_whatever_is_said(client: openai.OpenAI, choice: Any) -> None:
    for seed in range(5):
        answer = client.chat.completions.create(
            model="demo", messages=ASK, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False,  # type: ignore[arg-type]
            temperature=1.5, seed=seed, max_tokens=200,
        )  # fmt: skip
        [call] = answer.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        assert list(json.loads(call.function.arguments)) == ["city"]


def test_openai_parses_structured_output(client: openai.OpenAI) -> None:
    class Sum(pydantic.BaseModel):
        left: int = pydantic.Field(ge=0, le=999)
        right: int = pydantic.Field(ge=0, le=999)
        right_or_wrong: bool

    for seed in range(5):
        answer = client.chat.completions.parse(
            model="demo",
            messages=ASK,
            response_format=Sum,
            temperature=1.5,
            seed=seed,
            max_tokens=200,  # type: ignore[arg-type]
        )
        assert answer.choices[0].message.parsed is not None


def test_openai_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=ASK)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}})
    assert caught.value.code == "unsupported_schema"


def test_anthropic_answers_streams_and_calls_tools(demo_server: Any) -> None:
    with anthropic.Anthropic(base_url=demo_server.url, api_key="none", max_retries=0) as client:
        ask: Any = {"model": "demo", "max_tokens": 64, "messages": ASK, "extra_body": {"temperature": 0}}
        whole = client.messages.create(**ask)
        assert "362" in whole.content[0].text
        with client.messages.stream(**ask) as stream:
            assert "".join(stream.text_stream) == whole.content[0].text
            assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
        tool: Any = {"name": "get_weather", "description": "Weather.", "input_schema": WEATHER}
        called = client.messages.create(**ask | {"messages": TOOL_ASK}, tools=[tool])
        assert called.stop_reason == "tool_use"
        assert called.content[-1].input == {"city": "Paris"}
        counted = client.messages.count_tokens(model="demo", messages=TOOL_ASK, tools=[tool])  # type: ignore[arg-type]
        usage = called.usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_litellm(demo_server: Any) -> None:
    """In a process of its own: it changes global state and takes seconds to import."""
    code = f"""
import json, litellm
litellm.telemetry = False
common = dict(model="openai/demo", api_base="{demo_server.url}/v1", api_key="none", temperature=0, max_tokens=64)
whole = litellm.completion(messages={ASK!r}, **common)
parts = [c.choices[0].delta.content or "" for c in litellm.completion(messages={ASK!r}, stream=True, **common)]
called = litellm.completion(messages={TOOL_ASK!r}, tools={TOOLS!r}, **common)
[call] = called.choices[0].message.tool_calls
print(json.dumps([whole.choices[0].message.content, "".join(parts), call.function.name, call.function.arguments]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, streamed, name, arguments = json.loads(done.stdout.strip().splitlines()[-1])
    assert "362" in whole
    assert streamed == whole
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Paris"})


def test_guidellm_measures_the_server(demo_server: Any, tmp_path: Path) -> None:
    """The load generator gets every answer, of the length that it asked for."""
    program = Path(sys.executable).with_name("guidellm")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            program, "run", "--backend", f"kind=openai_http,target={demo_server.url},model=demo",
            "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=20",
            "--tokenizer", f"kind=hf_auto,model={resolve('demo')}",
            "--data", "kind=synthetic_text,prompt_tokens=48,output_tokens=16",
            "--output", f"kind=json,path={report}", "--disable-console",
        ],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    assert benchmark["metrics"]["request_totals"] == {"successful": 20, "errored": 0, "incomplete": 0, "total": 20}
    assert benchmark["metrics"]["output_token_count"]["successful"]["mean"] == 16
