"""Responses, files and batches of the built-in model, through the official client."""

import json
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
from tests.e2e.conftest import running_server

ASK = "What is 17 + 25?"
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}


@pytest.fixture
def client(demo_server):
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_stream_adds_up_to_the_whole_answer(client):
    ask = {"model": "demo", "input": ASK, "temperature": 0, "max_output_tokens": 32}
    whole = client.responses.create(**ask)
    with client.responses.stream(**ask) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == whole.output_text == final.output_text != ""
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens_details.cached_tokens > 0


def test_a_conversation_goes_on_and_finds_its_prefix_in_the_cache(client):
    first = client.responses.create(model="demo", input=ASK, temperature=0, max_output_tokens=32)
    second = client.responses.create(
        model="demo", input="And 3 more?", previous_response_id=first.id, max_output_tokens=8
    )
    assert second.usage.input_tokens > first.usage.total_tokens
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens // 16 * 16


def test_a_demanded_call_and_its_result(client):
    answer = client.responses.create(
        model="demo", input="Weather in Rome?", tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
        max_output_tokens=200,
    )  # fmt: skip
    call = answer.output[-1]
    assert (call.type, call.name, list(json.loads(call.arguments))) == ("function_call", "get_weather", ["city"])
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    after = client.responses.create(
        model="demo", input=[output], previous_response_id=answer.id, tools=[TOOL], max_output_tokens=16
    )
    assert after.status in ("completed", "incomplete")


def test_structured_output(client):
    class Sum(pydantic.BaseModel):
        left: int = pydantic.Field(ge=0, le=999)
        right_or_wrong: bool

    answer = client.responses.parse(model="demo", input=ASK, text_format=Sum, temperature=1.5, max_output_tokens=200)
    assert isinstance(answer.output_parsed, Sum)


def test_a_response_in_the_background(client):
    answer = client.responses.create(model="demo", input=ASK, background=True, temperature=0, max_output_tokens=16)
    while answer.status in ("queued", "in_progress"):
        answer = client.responses.retrieve(answer.id)
    assert answer.status in ("completed", "incomplete")
    assert answer.output_text
    endless = client.responses.create(
        model="demo", input=ASK, background=True, extra_body={"ignore_eos": True}, max_output_tokens=1500
    )
    cancelled = client.responses.cancel(endless.id)
    assert cancelled.status == "cancelled"


def test_a_long_conversation_is_compacted(client):
    talk = [m for i in range(30) for m in ({"role": "user", "content": f"What is {i} + {i}?"},
                                           {"role": "assistant", "content": f"{i} + {i} = {2 * i}. " * 4})]  # fmt: skip
    talk.append({"role": "user", "content": ASK})
    found = client.responses.compact(model="demo", input=talk, extra_body={"token_budget": 300})
    account = found.model_extra["compaction"]
    assert account["tokens_after"] <= 300 < account["tokens_before"]
    answer = client.responses.create(model="demo", input=found.output, max_output_tokens=16)
    assert answer.usage.input_tokens == account["tokens_after"]


def lines(count: int) -> bytes:
    body = {"messages": [{"role": "user", "content": ASK}], "max_tokens": 24, "ignore_eos": True}
    entries = [
        {"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": body | {"seed": i}}
        for i in range(count)
    ]
    return "\n".join(map(json.dumps, entries)).encode()


def test_a_batch_of_responses(client):
    body = {"model": "demo", "input": ASK, "max_output_tokens": 8}
    data = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}).encode()
    made = client.files.create(file=("in.jsonl", data), purpose="batch")
    batch = client.batches.create(input_file_id=made.id, endpoint="/v1/responses", completion_window="24h")
    while batch.status not in ("completed", "failed"):
        batch = client.batches.retrieve(batch.id)
    assert batch.request_counts.completed == 1
    [line] = client.files.content(batch.output_file_id).text.splitlines()
    assert json.loads(line)["response"]["body"]["object"] == "response"


def test_a_batch_goes_on_after_the_server_was_killed(tmp_path: Path):
    """The process is killed in the middle, twice; in the end each request has one answer."""
    count, batch_id = 60, ""
    flags = ("--served-model-name", "demo", "--state", str(tmp_path))
    for killed_at in (8, 24, None):
        with (
            running_server("demo", *flags) as server,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ):
            if not batch_id:
                made = client.files.create(file=("in.jsonl", lines(count)), purpose="batch")
                batch_id = client.batches.create(
                    input_file_id=made.id, endpoint="/v1/chat/completions", completion_window="24h"
                ).id
            batch = client.batches.retrieve(batch_id)
            while batch.status != "completed" and (killed_at is None or batch.request_counts.completed < killed_at):
                batch = client.batches.retrieve(batch_id)
            if killed_at is not None:
                assert batch.status == "in_progress"
                server.process.kill()
                server.process.wait()
            else:
                found = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
                assert server.stop() == 0
    assert batch.request_counts.model_dump() == {"total": count, "completed": count, "failed": 0}
    assert sorted(entry["custom_id"] for entry in found) == sorted(f"c{i}" for i in range(count))
    assert all(entry["response"]["body"]["usage"]["completion_tokens"] == 24 for entry in found)
