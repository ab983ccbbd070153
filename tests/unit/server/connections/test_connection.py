"""What one connection may take of the server."""

import asyncio
import json
import socket
from typing import Any

import pytest
from fastapi import FastAPI
from tests.unit.server.conftest import serving

from tokenmill.server.config import ServerConfig

GET = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


async def exchange(address: str, *parts: bytes) -> tuple[int, dict[str, Any]]:
    """Sends bytes and reads until the server closes the connection; the status and the JSON of the last answer."""
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize("end", [b"\r\n", b""], ids=["complete", "cut off"])
@pytest.mark.parametrize("size", [2000, 100_000])
async def test_a_head_that_is_too_large_gets_431(app: FastAPI, size: int, end: bytes) -> None:
    async with serving(app, ServerConfig(port=0, max_header_kib=1)) as address:
        status, body = await exchange(address, GET + b"x-long: " + b"a" * size + b"\r\n" + end)
    assert (status, body["error"]["code"]) == (431, "headers_too_large")


async def test_a_head_within_the_limit_may_come_with_a_large_body(app: FastAPI) -> None:
    content = b'{"prompt": "' + b"a" * 5000 + b'"}'
    head = POST + b"connection: close\r\ncontent-length: " + str(len(content)).encode() + b"\r\n\r\n"
    async with serving(app, ServerConfig(port=0, max_header_kib=1)) as address:
        status, body = await exchange(address, head + content)
    assert (status, body["object"]) == (200, "text_completion")


@pytest.mark.parametrize("sent", [GET, POST + b"content-length: 100\r\n\r\n", POST + b"content-length: 100\r\n\r\n{"])
async def test_a_request_that_does_not_arrive_gets_408(app: FastAPI, llm: Any, sent: bytes) -> None:
    async with serving(app, ServerConfig(port=0, body_timeout_s=0.1)) as address:
        status, body = await exchange(address, sent)
    assert (status, body["error"]["code"]) == (408, "body_too_slow")
    assert not llm.calls


async def test_a_connection_that_asks_nothing_is_closed(app: FastAPI) -> None:
    async with serving(app, ServerConfig(port=0, body_timeout_s=0.1)) as address:
        host, port = address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.read() == b""
        writer.close()


async def test_an_answer_that_takes_long_is_not_cut_off(app: FastAPI, llm: Any) -> None:
    content = b'{"prompt": "a"}'
    head = POST + b"connection: close\r\ncontent-length: " + str(len(content)).encode() + b"\r\n\r\n"
    release = asyncio.Event()
    generate = llm.generate

    async def slowly(*args: Any, **kwargs: Any) -> Any:
        await release.wait()
        async for output in generate(*args, **kwargs):
            yield output

    llm.generate = slowly
    async with serving(app, ServerConfig(port=0, body_timeout_s=0.1)) as address:
        asking = asyncio.create_task(exchange(address, head + content))
        # Another connection's limit passes meanwhile, which was opened later.
        assert (await exchange(address, GET))[0] == 408
        release.set()
        assert (await asking)[0] == 200


async def test_connections_beyond_the_limit_get_503_but_probes_an_answer(app: FastAPI) -> None:
    async with serving(app, ServerConfig(port=0, max_connections=1)) as address:
        host, port = address.removeprefix("http://").split(":")
        _, first = await asyncio.open_connection(host, int(port))
        status, body = await exchange(address, GET + b"\r\n")
        assert (status, body["error"]["code"]) == (503, "too_many_connections")
        status, _ = await exchange(address, b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert status == 200
        first.close()


async def test_a_client_that_does_not_read_is_cut_off_and_its_request_aborted(app: FastAPI, llm: Any) -> None:
    llm.pieces = ["word " * 2000] * 800  # more than any socket holds
    llm.endless = True
    content = b'{"prompt": "a", "stream": true}'
    head = POST + b"content-length: " + str(len(content)).encode() + b"\r\n\r\n"
    async with serving(app, ServerConfig(port=0, write_timeout_s=0.2)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(stuck, (host, int(port)))
            await loop.sock_sendall(stuck, head + content)
            _, given_up = await llm.ended.get()
    assert given_up
