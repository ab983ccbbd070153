"""Filters stand in the way of every endpoint's prompts and answers, whole or streamed."""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tokenmill.errors import ConfigError, RequestError
from tokenmill.server.config import FilterConfig, ServerConfig
from tokenmill.server.filter import FilterChain

Connect = Callable[[ServerConfig], contextlib.AbstractAsyncContextManager[httpx2.AsyncClient]]
MAIL = "bob@mail.example"


@pytest.fixture
def filtered(connect: Connect, tmp_path: Path) -> contextlib.AbstractAsyncContextManager[httpx2.AsyncClient]:
    patterns = tmp_path / "patterns"
    patterns.write_text("stop here\n")
    return connect(ServerConfig(filters=FilterConfig(filters=("pii", "banned"), banned_patterns=str(patterns))))


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def events(answer: httpx2.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


async def test_the_model_never_sees_what_is_redacted(llm: Any, filtered: Any) -> None:
    parts = [{"type": "text", "text": f"to {MAIL}"}]
    call = {"id": "c", "type": "function", "function": {"name": "send", "arguments": json.dumps({"to": MAIL})}}
    messages = [
        {"role": "system", "content": f"from {MAIL}"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": MAIL},
    ]
    async with filtered as http:
        answers = [
            await http.post("/v1/chat/completions", json={"messages": messages}),
            await http.post("/v1/completions", json={"prompt": f"to {MAIL}"}),
            await http.post("/v1/completions", json={"prompt": llm.tokenizer.encode(f"to {MAIL}")}),
            await http.post("/v1/messages", json=chat(MAIL, model="scripted", max_tokens=9)),
        ]
    assert [answer.status_code for answer in answers] == [200] * 4
    seen = [llm.tokenizer.decode(call.prompt) for call in llm.calls]
    assert all("[EMAIL]" in text and MAIL not in text for text in seen)


async def test_token_ids_stay_as_they_are_when_there_is_nothing_to_redact(llm: Any, filtered: Any) -> None:
    ids = [*llm.tokenizer.encode("Hel"), *llm.tokenizer.encode("lo")]
    async with filtered as http:
        await http.post("/v1/completions", json={"prompt": ids})
    assert llm.calls[0].prompt == ids


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_are_redacted_whole_and_streamed(llm: Any, filtered: Any, stream: bool, n: int) -> None:
    llm.pieces = ["Write to bob", "@mail.", "example", " or call"]
    async with filtered as http:
        answer = await http.post("/v1/chat/completions", json=chat("Hi", stream=stream, n=n))
    texts = dict.fromkeys(range(n), "")
    for part in events(answer) if stream else [answer.json()]:
        for choice in part["choices"]:
            texts[choice["index"]] += choice.get("delta" if stream else "message", {}).get("content") or ""
    assert texts == dict.fromkeys(range(n), "Write to [EMAIL] or call")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_becomes_banned_ends_before_it(llm: Any, filtered: Any, stream: bool) -> None:
    llm.pieces = ["Go on, ", "but stop", " here", " and never"]
    llm.endless = True  # only the filter ends it
    async with filtered as http:
        answer = await http.post("/v1/completions", json={"prompt": "Hi", "stream": stream})
    choices = [part["choices"][0] for part in (events(answer) if stream else [answer.json()])]
    assert "".join(choice["text"] for choice in choices) == "Go on, but "
    assert choices[-1]["finish_reason"] == "content_filter"
    assert await llm.ended.get() == (llm.calls[0].request_id, True)


async def test_other_completions_go_on_when_one_is_ended(llm: Any, filtered: Any) -> None:
    llm.pieces = ["Go stop", " here", " on"]
    texts = iter(["fine", "Go stop", "fine", " here", "fine", " on"])
    whole = llm._completion
    llm._completion = lambda index, piece, params: whole(index, piece and next(texts), params)
    async with filtered as http:
        answer = await http.post("/v1/completions", json={"prompt": "Hi", "stream": True, "n": 2})
    shown = [choice for part in events(answer) for choice in part["choices"]]
    assert "".join(choice["text"] for choice in shown if choice["index"] == 0) == "finefinefine"
    assert "".join(choice["text"] for choice in shown if choice["index"] == 1) == "Go "
    ends = {choice["index"]: choice["finish_reason"] for choice in shown if choice["finish_reason"]}
    assert ends == {0: "stop", 1: "content_filter"}


async def test_messages_call_it_a_refusal(llm: Any, filtered: Any) -> None:
    llm.pieces = ["stop", " here"]
    async with filtered as http:
        answer = await http.post("/v1/messages", json=chat("Hi", model="scripted", max_tokens=9))
    assert answer.json()["stop_reason"] == "refusal"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_banned_prompts_are_refused(llm: Any, filtered: Any, path: str) -> None:
    async with filtered as http:
        answer = await http.post(path, json=chat("now stop here") if "chat" in path else {"prompt": "now stop here"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_refused")
    assert "stop here" not in answer.text
    assert llm.calls == []


async def test_log_probabilities_would_show_what_is_taken_out(llm: Any, filtered: Any) -> None:
    async with filtered as http:
        answer = await http.post("/v1/completions", json={"prompt": "Hi", "logprobs": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "logprobs_filtered")
    assert llm.calls == []


async def test_without_filters_everything_is_passed_on_untouched() -> None:
    anything: Any = object()
    assert FilterChain().answer(anything, 1, True) is anything
    assert await FilterChain().messages(anything) is anything
    assert await FilterChain().prompt(anything, str) is anything


async def test_the_filter_in_the_documentation_is_a_filter() -> None:
    document = (Path(__file__).parents[3] / "docs" / "filters.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "filters.md", "exec"), names)
    chain = FilterChain((names["FILTER"](FilterConfig()),))
    assert await chain.text("short") == "short"
    assert await chain.stream().push("a") == "a"
    with pytest.raises(RequestError):
        await chain.text("x" * 1001)


@pytest.mark.parametrize(
    ("names", "code"),
    [(("pii", "pii"), "repeated_filter"), (("pij",), "unknown_choice"), (("banned",), "missing_option")],
)
def test_wrong_options_are_told_at_the_start(names: tuple[str, ...], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FilterChain.of(FilterConfig(filters=names))
    assert caught.value.code == code
