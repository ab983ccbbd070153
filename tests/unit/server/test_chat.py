"""POST /v1/chat/completions through the official client."""

import json
from typing import Any

import httpx2
import openai
import pytest

from tokenmill.types import FinishReason, SamplingParams

USER: Any = [{"role": "user", "content": "Hi"}]


async def test_answer(client: openai.AsyncOpenAI, llm: Any) -> None:
    answer = await client.chat.completions.create(model="scripted", messages=USER)
    [choice] = answer.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", "Hello world")
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert (answer.object, answer.model) == ("chat.completion", "scripted")
    assert answer.id.startswith("chatcmpl-")
    prompt = llm.tokenizer.encode("<user>Hi<assistant>")
    assert llm.calls[0].prompt == prompt
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == sum(len(llm.tokenizer.encode(piece)) for piece in llm.pieces)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == len(prompt) // 2


async def test_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="scripted", messages=USER, stream=True)
    chunks = [chunk async for chunk in stream]
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert [choice.delta.content for choice in middle] == ["Hel", "lo", " world"]
    assert [choice.finish_reason for choice in middle] == [None] * 3
    assert (last.delta.content, last.finish_reason) == (None, "stop")
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks)


async def test_stream_on_the_wire(http: httpx2.AsyncClient, chat_body: Any) -> None:
    answer = await http.post("/v1/chat/completions", json=chat_body(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, nothing = answer.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "usage" not in chunks[0]
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }


async def test_usage_in_a_last_chunk_without_choices(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="scripted", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    whole = await client.chat.completions.create(model="scripted", messages=USER)
    assert last.usage == whole.usage


async def test_usage_so_far_with_every_chunk(http: httpx2.AsyncClient, llm: Any, chat_body: Any) -> None:
    body = chat_body(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    answer = await http.post("/v1/chat/completions", json=body)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    counts = [event["usage"]["completion_tokens"] for event in events]
    pieces = [len(llm.tokenizer.encode(piece)) for piece in llm.pieces]
    assert counts == [pieces[0], pieces[0], pieces[0] + pieces[1], *[sum(pieces)] * 3]


async def test_several_choices(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="scripted", messages=USER, n=3)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [
        (index, "Hello world") for index in range(3)
    ]
    stream = await client.chat.completions.create(model="scripted", messages=USER, n=2, stream=True)
    texts, finished = {0: "", 1: ""}, set()
    roles = []
    async for chunk in stream:
        [choice] = chunk.choices
        assert choice.index not in finished
        texts[choice.index] += choice.delta.content or ""
        if choice.delta.role:
            roles.append(choice.index)
        if choice.finish_reason:
            finished.add(choice.index)
    assert texts == {0: "Hello world", 1: "Hello world"}
    assert sorted(roles) == sorted(finished) == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(client: openai.AsyncOpenAI, llm: Any, stream: bool) -> None:
    llm.pieces = ["é", "!"]
    answer: Any = await client.chat.completions.create(
        model="scripted", messages=USER, logprobs=True, top_logprobs=2, stream=stream
    )
    if stream:
        content = [
            token async for chunk in answer if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
        ]
    else:
        content = answer.choices[0].logprobs.content
    assert [bytes(token.bytes) for token in content] == [b"\xc3", b"\xa9", b"!"]
    assert [token.token for token in content] == ["\ufffd", "\ufffd", "!"]
    assert [token.logprob for token in content] == [-0.5] * 3
    # Minus infinity is not JSON: OpenAI writes -9999.
    assert [[top.logprob for top in token.top_logprobs] for token in content] == [[-0.25, -9999.0]] * 3


async def test_tokens_without_text_yet_still_bring_their_logprobs(http: httpx2.AsyncClient, llm: Any) -> None:
    llm.pieces = ["a", "", "b"]
    llm._completion = lambda index, text, params: _silent(llm, index, text, params)
    body = {"messages": USER, "stream": True, "logprobs": True}
    answer = await http.post("/v1/chat/completions", json=body)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    tokens = [entry["token"] for e in events for entry in (e["choices"][0]["logprobs"] or {}).get("content", [])]
    assert tokens == ["a", "x", "b"]


def _silent(llm: Any, index: int, text: str, params: Any) -> Any:
    completion = type(llm)._completion(llm, index, text or "x", params)
    completion.text = text
    return completion


async def test_parameters_reach_the_engine(client: openai.AsyncOpenAI, llm: Any) -> None:
    await client.chat.completions.create(
        model="scripted",
        messages=USER,
        n=2,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"5": -100},
        seed=7,
        stop=["a", "b"],
        max_completion_tokens=9,
        extra_body={
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "stop_token_ids": [3],
            "ignore_eos": True,
            "min_tokens": 2,
            "prompt_logprobs": 1,
            "allowed_token_ids": [1, 2],
            "bad_words": ["no"],
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "cache_salt": "salt",
            "priority": 3,
            "user": "me",
        },
    )
    [call] = llm.calls
    assert call.params == SamplingParams(
        n=2,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={5: -100.0},
        seed=7,
        stop=["a", "b"],
        max_tokens=9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        stop_token_ids=[3],
        ignore_eos=True,
        min_tokens=2,
        prompt_logprobs=1,
        allowed_token_ids=[1, 2],
        bad_words=["no"],
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    )
    assert (call.cache_salt, call.priority, call.tenant, call.delta) == ("salt", 3, "me", False)


async def test_without_a_limit_the_answer_may_fill_the_context(client: openai.AsyncOpenAI, llm: Any) -> None:
    await client.chat.completions.create(model="scripted", messages=USER)
    await client.chat.completions.create(model="scripted", messages=USER, max_tokens=5)
    assert [call.params.max_tokens for call in llm.calls] == [None, 5]


async def test_parameters_of_openais_platform_change_nothing(client: openai.AsyncOpenAI, llm: Any) -> None:
    await client.chat.completions.create(model="scripted", messages=USER)
    await client.chat.completions.create(
        model="scripted",
        messages=USER,
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
    )
    assert llm.calls[0].params == llm.calls[1].params


async def test_tools_and_variables_reach_the_template(client: openai.AsyncOpenAI, llm: Any) -> None:
    tools: Any = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    for choice in ("auto", "none"):
        await client.chat.completions.create(
            model="scripted",
            messages=USER,
            tools=tools,
            tool_choice=choice,  # type: ignore[arg-type]
            extra_body={"chat_template_kwargs": {"mood": "happy"}, "add_generation_prompt": False},
        )
    prompts = [llm.tokenizer.decode(call.prompt) for call in llm.calls]
    assert prompts == ["[clock]<user>Hihappy", "<user>Hihappy"]


async def test_prompt_logprobs(http: httpx2.AsyncClient, llm: Any, chat_body: Any) -> None:
    answer = (await http.post("/v1/chat/completions", json=chat_body(prompt_logprobs=1))).json()
    ids = llm.calls[0].prompt
    nothing, second, *_ = answer["prompt_logprobs"]
    assert nothing is None
    assert second == {
        str(ids[1]): {"logprob": -0.5, "rank": 2, "decoded_token": llm.tokenizer.token_text(ids[1])},
        str(ids[1] + 1): {"logprob": -0.25, "rank": 1, "decoded_token": llm.tokenizer.token_text(ids[1] + 1)},
    }


async def test_aborted_by_the_engine(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.finish = FinishReason.ABORT
    answer = await client.chat.completions.create(model="scripted", messages=USER)
    assert answer.choices[0].finish_reason == "abort"
