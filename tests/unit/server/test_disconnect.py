"""A client that goes away takes its request with it."""

import asyncio
from typing import Any

import httpx2
import pytest

from tokenmill.errors import RequestError
from tokenmill.server.generation import EventStream, merge, until_disconnect

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": ["a", "b"]},
}


@pytest.mark.parametrize("path", BODIES)
async def test_leaving_a_stream_aborts(url: str, llm: Any, path: str) -> None:
    llm.endless = True
    async with (
        httpx2.AsyncClient() as client,
        client.stream("POST", url + path, json=BODIES[path] | {"stream": True}) as answer,
    ):
        async for line in answer.aiter_lines():
            if " world" in line:
                break
    for _ in range(len(BODIES[path].get("prompt", ["one"]))):
        _, given_up = await llm.ended.get()
        assert given_up


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_leaving_before_the_first_byte_aborts(url: str, llm: Any, path: str, stream: bool) -> None:
    llm.endless = True
    llm.pieces = [] if stream else llm.pieces
    begun = asyncio.Event()
    generate = llm.generate

    def observed(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        return generate(*args, **kwargs)

    llm.generate = observed
    async with httpx2.AsyncClient() as client:
        asking = asyncio.create_task(client.post(url + path, json=BODIES[path] | {"stream": stream}))
        await begun.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    _, given_up = await llm.ended.get()
    assert given_up


async def test_work_that_ends_first_is_returned_and_the_watch_ends() -> None:
    watched = asyncio.Event()
    ended = asyncio.Event()

    async def receive() -> Any:
        try:
            watched.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def work() -> int:
        await watched.wait()
        return 5

    assert await until_disconnect(receive, work()) == 5
    assert ended.is_set()


async def test_work_is_cancelled_when_the_client_leaves_and_has_ended_then() -> None:
    cleaned = asyncio.Event()
    messages = iter(["http.request", "http.disconnect"])

    async def receive() -> Any:
        return {"type": next(messages)}

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    with pytest.raises(RequestError) as caught:
        await until_disconnect(receive, work())
    assert caught.value.code == "client_gone"
    assert cleaned.is_set()


async def test_merge_gives_everything_and_closing_it_closes_all() -> None:
    closed: list[str] = []

    async def count(name: str, limit: int) -> Any:
        try:
            for number in range(limit):
                yield f"{name}{number}"
                await asyncio.sleep(0)
        finally:
            closed.append(name)

    merged = merge([count("a", 3), count("b", 2)])
    assert sorted([item async for item in merged]) == [(0, "a0"), (0, "a1"), (0, "a2"), (1, "b0"), (1, "b1")]
    assert sorted(closed) == ["a", "b"]

    closed.clear()
    merged = merge([count("a", 10**9), count("b", 10**9)])
    await anext(merged)
    await anext(merged)
    await merged.aclose()
    assert sorted(closed) == ["a", "b"]


async def test_a_client_that_stops_reading_and_leaves_closes_the_generator() -> None:
    closed, blocked = asyncio.Event(), asyncio.Event()

    async def events() -> Any:
        try:
            while True:
                yield b"data: 1\n\n"
        finally:
            closed.set()

    async def send(message: Any) -> None:
        if message.get("body") == b"data: 1\n\n":
            blocked.set()
            await asyncio.Event().wait()

    async def receive() -> Any:
        await blocked.wait()
        return {"type": "http.disconnect"}

    generator = events()
    stream = EventStream(await anext(generator), generator, "id")
    await stream({"type": "http"}, receive, send)
    assert closed.is_set()
