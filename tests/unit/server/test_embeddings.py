"""POST /v1/embeddings through the official client."""

import base64
import dataclasses
from array import array
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI

from tokenmill.errors import RequestError
from tokenmill.server.call import Call, Outcome
from tokenmill.types import ErrorInfo, PoolingParams


async def test_the_official_client_gets_numbers(client: openai.AsyncOpenAI, llm: Any) -> None:
    answer = await client.embeddings.create(model="scripted", input="aab")  # it asks for base64 by itself
    [item] = answer.data
    assert (answer.object, item.object, item.index, answer.model) == ("list", "embedding", 0, "scripted")
    assert item.embedding == pytest.approx([2 / 6**0.5, 1 / 6**0.5, 0, 1 / 6**0.5])
    assert llm.calls[0].prompt == llm.tokenizer.encode("aab")
    assert llm.calls[0].pooling == PoolingParams()


@pytest.mark.parametrize(
    ("given", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
async def test_inputs_of_all_kinds_keep_their_order_and_their_tokens_are_counted(
    client: openai.AsyncOpenAI, llm: Any, given: Any, prompts: list[Any]
) -> None:
    answer = await client.embeddings.create(model="scripted", input=given)
    ids = [llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    assert [call.prompt for call in llm.calls] == ids
    assert [item.index for item in answer.data] == list(range(len(prompts)))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))


async def test_both_encodings_hold_the_same_numbers(http: httpx2.AsyncClient) -> None:
    body = {"model": "scripted", "input": "abc"}
    numbers = (await http.post("/v1/embeddings", json=body)).json()["data"][0]["embedding"]
    packed = (await http.post("/v1/embeddings", json=body | {"encoding_format": "base64"})).json()["data"][0]
    assert array("f", base64.b64decode(packed["embedding"])).tolist() == numbers


async def test_dimensions_and_normalize_reach_the_engine(http: httpx2.AsyncClient, llm: Any) -> None:
    llm.pooling = PoolingParams(pooling="mean")
    body = {"input": "aaa", "dimensions": 2, "normalize": False, "user": "me", "priority": 3, "cache_salt": "s"}
    answer = await http.post("/v1/embeddings", json=body)
    assert answer.json()["data"][0]["embedding"] == [3.0, 0.0]
    [call] = llm.calls
    assert call.pooling == PoolingParams(pooling="mean", dimensions=2, normalize=False)
    assert (call.tenant, call.priority, call.cache_salt) == ("me", 3, "s")


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"input": []}, "empty_prompt", "input"),
        ({"input": ["a"] * 2049}, "invalid_parameter", "input"),
        ({"input": [1.5]}, "invalid_parameter", "input"),
        ({"input": None}, "invalid_parameter", "input"),
        ({"encoding_format": "hex"}, "invalid_parameter", "encoding_format"),
        ({"dimensions": 0}, "invalid_parameter", "dimensions"),
        ({"dimension": 4}, "unknown_parameter", "dimension"),
        ({"model": "other"}, "model_not_found", "model"),
    ],
)
async def test_a_fault_is_named_by_its_field(http: httpx2.AsyncClient, change: Any, code: str, field: str) -> None:
    answer = await http.post("/v1/embeddings", json={"input": "a"} | change)
    assert answer.status_code in (400, 404)
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, field)


async def test_a_refusal_of_the_engine_names_the_input(http: httpx2.AsyncClient, llm: Any) -> None:
    llm.refusal = RequestError("prompt_too_long", "The prompt has 9 tokens; at most 8 fit.", "prompt")
    error = (await http.post("/v1/embeddings", json={"input": "a"})).json()["error"]
    assert (error["code"], error["param"]) == ("prompt_too_long", "input")


async def test_an_embedding_passes_those_who_watch_over_calls(http: httpx2.AsyncClient, app: FastAPI, llm: Any) -> None:
    ended: list[tuple[Call, Outcome]] = []

    class Books:
        async def begin(self, call: Call) -> None:
            assert call.prompt_token_ids == llm.tokenizer.encode("hello")

        def end(self, call: Call, outcome: Outcome) -> None:
            ended.append((call, outcome))

    app.state.service = dataclasses.replace(app.state.service, interceptors=(Books(),))
    await http.post("/v1/embeddings", json={"input": ["hello", "hello"]})
    assert [call.endpoint for call, _ in ended] == ["/v1/embeddings"] * 2
    assert len({call.request_id for call, _ in ended}) == 2
    for _, outcome in ended:
        assert (outcome.finish_reasons, outcome.error_code, outcome.completion_tokens) == (("stop",), "", 0)
        assert outcome.prompt_tokens == len(llm.tokenizer.encode("hello"))


async def test_a_failure_of_the_engine_is_a_500(http: httpx2.AsyncClient, llm: Any) -> None:
    llm.failure = ErrorInfo("step_failed", "The step failed.")
    answer = await http.post("/v1/embeddings", json={"input": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "step_failed")
