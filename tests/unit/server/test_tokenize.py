"""POST /tokenize, /detokenize and /v1/chat/render, and GET /version."""

from typing import Any

import httpx2
import pytest

import tokenmill


async def test_a_text_becomes_tokens_and_comes_back(http: httpx2.AsyncClient, llm: Any) -> None:
    answer = (await http.post("/tokenize", json={"model": "scripted", "prompt": "Hello world"})).json()
    assert answer["tokens"] == llm.tokenizer.encode("Hello world")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 2048)
    assert answer["token_strs"] is None
    back = await http.post("/detokenize", json={"tokens": answer["tokens"]})
    assert back.json() == {"prompt": "Hello world"}
    assert llm.calls == []


async def test_the_texts_of_tokens_on_request(http: httpx2.AsyncClient) -> None:
    answer = (await http.post("/tokenize", json={"prompt": "Hello world", "return_token_strs": True})).json()
    assert "".join(answer["token_strs"]) == "Hello world"
    assert len(answer["token_strs"]) == answer["count"]


async def test_messages_go_through_the_chat_template(http: httpx2.AsyncClient, llm: Any, chat_body: Any) -> None:
    tool = {"type": "function", "function": {"name": "find"}}
    body = chat_body(tools=[tool], chat_template_kwargs={"mood": "calm"})
    answer = (await http.post("/tokenize", json=body)).json()
    assert llm.tokenizer.decode(answer["tokens"]) == "[find]<user>Hi<assistant>calm"
    answer = (await http.post("/tokenize", json=body | {"add_generation_prompt": False})).json()
    assert llm.tokenizer.decode(answer["tokens"]) == "[find]<user>Hicalm"


@pytest.mark.parametrize("path", ["/v1/chat/render", "/v1/chat/completions/render"])
async def test_a_rendered_chat_is_what_the_model_would_get(
    http: httpx2.AsyncClient, llm: Any, chat_body: Any, path: str
) -> None:
    tool = {"type": "function", "function": {"name": "find"}}
    body = chat_body(tools=[tool], chat_template_kwargs={"mood": "calm"}, temperature=0.5, max_tokens=3)
    answer = (await http.post(path, json=body)).json()
    assert answer["prompt"] == "[find]<user>Hi<assistant>calm"
    assert llm.calls == []
    await http.post("/v1/chat/completions", json=body)
    assert answer["token_ids"] == llm.calls[0].prompt
    assert (answer["count"], answer["model"]) == (len(answer["token_ids"]), "scripted")


@pytest.mark.parametrize(
    ("path", "body", "code", "field"),
    [
        ("/tokenize", {}, "invalid_parameter", "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user"}]}, "invalid_parameter", "prompt"),
        ("/tokenize", {"messages": []}, "invalid_parameter", "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model_not_found", "model"),
        ("/detokenize", {"tokens": [1, 10**9]}, "invalid_token", "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "invalid_token", "tokens[0]"),
        ("/detokenize", {"tokens": "1"}, "invalid_parameter", "tokens"),
        ("/v1/chat/render", {}, "missing_parameter", "messages"),
        (
            "/tokenize",
            {"messages": [{"role": "user"}], "chat_template_kwargs": {"tools": 1}},
            "invalid_parameter",
            "chat_template_kwargs",
        ),
    ],
)
async def test_a_fault_is_named_by_its_field(
    http: httpx2.AsyncClient, path: str, body: Any, code: str, field: str | None
) -> None:
    answer = await http.post(path, json=body)
    assert answer.status_code in (400, 404)
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, field)


async def test_version(http: httpx2.AsyncClient) -> None:
    assert (await http.get("/version")).json() == {"version": tokenmill.__version__}
