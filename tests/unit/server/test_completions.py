"""POST /v1/completions through the official client."""

import json
from typing import Any

import httpx2
import openai
import pytest

from tokenmill.errors import RequestError


async def test_answer(client: openai.AsyncOpenAI, llm: Any) -> None:
    answer = await client.completions.create(model="scripted", prompt="Once")
    [choice] = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "Hello world", "stop", None)
    assert (answer.object, answer.id[:5]) == ("text_completion", "cmpl-")
    assert llm.calls[0].prompt == llm.tokenizer.encode("Once")
    assert llm.calls[0].params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_of_all_kinds_and_the_order_of_choices(
    client: openai.AsyncOpenAI, llm: Any, prompt: Any, prompts: list[Any], stream: bool
) -> None:
    answer: Any = await client.completions.create(model="scripted", prompt=prompt, n=2, echo=True, stream=stream)
    texts = [""] * (2 * len(prompts))
    if stream:
        async for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        for position, choice in enumerate(answer.choices):
            assert choice.index == position
            texts[choice.index] = choice.text
    ids = [llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    assert [call.prompt for call in llm.calls] == ids
    shown = [prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt) for prompt in prompts]
    assert texts == [text + "Hello world" for text in shown for _ in range(2)]
    assert len({call.request_id for call in llm.calls}) == len(prompts)


async def test_usage_adds_up_over_prompts_and_choices(client: openai.AsyncOpenAI, llm: Any) -> None:
    whole = await client.completions.create(model="scripted", prompt=[[1, 2, 3, 4], [5, 6]], n=2)
    generated = 4 * sum(len(llm.tokenizer.encode(piece)) for piece in llm.pieces)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 6
    assert whole.usage.completion_tokens == generated
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 3
    stream = await client.completions.create(
        model="scripted", prompt=[[1, 2, 3, 4], [5, 6]], n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []


async def test_logprobs(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.pieces = ["H", "e"]
    answer = await client.completions.create(model="scripted", prompt="a", logprobs=1)
    logprobs: Any = answer.choices[0].logprobs
    assert logprobs.tokens == ["H", "e"]
    assert logprobs.token_logprobs == [-0.5, -0.5]
    assert logprobs.text_offset == [0, 1]
    first = llm.tokenizer.encode("H")[0]
    assert logprobs.top_logprobs[0] == {"H": -0.5, llm.tokenizer.token_text(first + 1): -0.25}


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_an_echoed_prompt(client: openai.AsyncOpenAI, llm: Any, stream: bool) -> None:
    llm.pieces = ["H", "e"]
    answer: Any = await client.completions.create(model="scripted", prompt="xyz", echo=True, logprobs=1, stream=stream)
    parts = [chunk async for chunk in answer] if stream else [answer]
    fields = ("tokens", "token_logprobs", "text_offset", "top_logprobs")
    found = {
        field: [v for part in parts if part.choices[0].logprobs for v in getattr(part.choices[0].logprobs, field)]
        for field in fields
    }
    assert found["tokens"] == ["x", "y", "z", "H", "e"]
    assert found["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert found["text_offset"] == [0, 1, 2, 3, 4]
    assert found["top_logprobs"][0] is None
    assert len(found["top_logprobs"]) == 5


async def test_scoring_a_prompt_generates_nothing(client: openai.AsyncOpenAI, llm: Any) -> None:
    answer = await client.completions.create(model="scripted", prompt="xyz", echo=True, logprobs=0, max_tokens=0)
    [choice] = answer.choices
    assert choice.text == "xyz"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["x", "y", "z"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 0)
    assert llm.calls[0].params.max_tokens == 1


async def test_prompt_logprobs(http: httpx2.AsyncClient) -> None:
    body = {"prompt": [[10, 11], [12]], "prompt_logprobs": 0}
    choices = (await http.post("/v1/completions", json=body)).json()["choices"]
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [2, 1]
    assert list(choices[0]["prompt_logprobs"][1]) == ["11", "12"]


async def test_stream_ends_with_done(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json={"prompt": "a", "stream": True})
    *events, end = [line for line in answer.text.splitlines() if line]
    assert end == "data: [DONE]"
    chunks = [json.loads(event[6:]) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello world"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]


async def test_one_prompt_that_fails_gives_up_the_others(http: httpx2.AsyncClient, llm: Any) -> None:
    generate = llm.generate

    async def refuse(prompt: Any, params: Any, **rest: Any) -> Any:
        if prompt == llm.tokenizer.encode("b"):
            raise RequestError("prompt_too_long", "Too long.", "prompt")
        async for output in generate(prompt, params, **rest):
            yield output

    llm.endless = True
    llm.generate = refuse
    answer = await http.post("/v1/completions", json={"prompt": ["a", "b"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "prompt_too_long")
    request_id, given_up = await llm.ended.get()
    assert (request_id[-2:], given_up) == ("-0", True)
