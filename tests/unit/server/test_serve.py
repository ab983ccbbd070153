"""The life of the server process: readiness, signals, an address that is taken."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest

from tokenmill.engine.config import EngineConfig
from tokenmill.errors import ConfigError
from tokenmill.server import app as server_app
from tokenmill.server.config import ServerConfig

CONFIG = ServerConfig(port=0, served_model_name=("scripted",))


class Started:
    """A server that runs in this event loop."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.ready = asyncio.Event()
        announce = server_app._announce

        def announced(*args: Any) -> None:
            announce(*args)
            self.ready.set()

        monkeypatch.setattr(server_app, "_announce", announced)
        self._capsys = capsys
        self._listener = server_app._bind(CONFIG)
        self.status = asyncio.create_task(server_app._serve(EngineConfig(), CONFIG, self._listener))

    async def url(self) -> str:
        await self.ready.wait()
        return self._capsys.readouterr().out.split()[-1]


@pytest.fixture
def start(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Started]:
    def starting(loading: Callable[[], Awaitable[Any]]) -> Started:
        async def load(*_: Any) -> Any:
            return await loading()

        monkeypatch.setattr(server_app.AsyncLLM, "start", load)
        return Started(capsys, monkeypatch)

    return starting


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_then_ends(start: Any, llm: Any, number: int) -> None:
    before = signal.getsignal(number)

    async def load() -> Any:
        return llm

    server = start(load)
    async with httpx2.AsyncClient(base_url=await server.url()) as http:
        assert (await http.get("/health")).status_code == 200
        os.kill(os.getpid(), number)
        answer = await http.get("/health")
        while answer.status_code == 200:
            answer = await http.get("/health")
        assert answer.json()["status"] == "shutting_down"
        assert not server.status.done()
        # What is under way is still served.
        answer = await http.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 200
        llm.drained.set()
        assert await server.status == 0
    assert llm.closed
    assert signal.getsignal(number) == before


async def test_a_second_signal_does_not_wait_for_the_drain(start: Any, llm: Any) -> None:
    async def load() -> Any:
        return llm

    server = start(load)
    async with httpx2.AsyncClient(base_url=await server.url()) as http:
        terminate()
        while (await http.get("/health")).status_code == 200:
            pass
        terminate()
        assert await server.status == 0
    assert llm.closed
    assert not llm.drained.is_set()


async def test_a_signal_while_the_model_loads_ends_the_loading(start: Any) -> None:
    loading, gave_up = asyncio.Event(), asyncio.Event()

    async def load() -> Any:
        try:
            loading.set()
            await asyncio.Event().wait()
        finally:
            gave_up.set()

    server = start(load)
    await loading.wait()
    terminate()
    assert await server.status == 0
    assert gave_up.is_set()
    assert not server.ready.is_set()


def test_an_address_that_is_taken_is_known_before_the_model_loads() -> None:
    with server_app._bind(CONFIG) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            server_app.serve(EngineConfig(), ServerConfig(port=port))
    assert (caught.value.code, caught.value.field) == ("address_unavailable", "port")


def test_an_unknown_host() -> None:
    with pytest.raises(ConfigError) as caught:
        server_app.serve(EngineConfig(), ServerConfig(host="no.such.host.invalid"))
    assert caught.value.code == "address_unavailable"
