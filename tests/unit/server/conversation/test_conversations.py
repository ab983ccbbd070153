"""A client that asks learns what the prefix cache did for it, and why not more."""

import logging
from typing import Any

import httpx2
import openai
import pytest

FIRST = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TOOLS: Any = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]


async def ask(http: httpx2.AsyncClient, messages: Any, **more: Any) -> Any:
    answer = await http.post("/v1/chat/completions", json={"messages": messages, "cache_report": True, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["cache_report"]


async def test_the_first_request_has_none_before_it(http: httpx2.AsyncClient) -> None:
    report = await ask(http, FIRST)
    assert report["previous_request"] is None
    assert report["cached_tokens"] == report["prompt_tokens"] // 2


async def test_a_conversation_that_goes_on_loses_nothing(http: httpx2.AsyncClient) -> None:
    await ask(http, FIRST)
    report = await ask(
        http, [*FIRST, {"role": "assistant", "content": "Hello world"}, {"role": "user", "content": "?"}]
    )
    assert (report["cause"], report["lost_tokens"]) == ("none", 0)


async def test_the_loss_is_explained_in_the_answer_and_in_the_log(
    http: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tokenmill")
    await ask(http, FIRST, tools=TOOLS)
    report = await ask(http, FIRST, tools=TOOLS[::-1])
    assert report["cause"] == "tools_reordered"
    assert report["previous_request"].startswith("chatcmpl-")
    assert report["explanation"].endswith(f"at token {report['shared_tokens']}: tools reordered")
    assert report["explanation"] in caplog.text


async def test_other_tenants_and_conversations_are_not_compared(http: httpx2.AsyncClient) -> None:
    await ask(http, FIRST, user="a")
    assert (await ask(http, FIRST, user="b"))["previous_request"] is None
    assert (await ask(http, [{"role": "user", "content": "Other"}], user="a"))["previous_request"] is None


async def test_a_trimmed_history_is_still_the_same_conversation(http: httpx2.AsyncClient) -> None:
    long = [*FIRST, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "More"}]
    await ask(http, long)
    report = await ask(http, [FIRST[0], *long[2:]])
    assert report["cause"] == "message_dropped"


async def test_a_stream_tells_it_at_the_end(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="scripted",
        messages=FIRST,
        stream=True,
        extra_body={"cache_report": True},  # type: ignore[arg-type]
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["cache_report"]["previous_request"] is None
