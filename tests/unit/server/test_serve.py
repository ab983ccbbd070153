"""The life of the server process: readiness, signals, an address that is taken."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest

from tokenmill.engine.config import EngineConfig
from tokenmill.errors import ConfigError, ModelError
from tokenmill.observer import Health
from tokenmill.server import app as server_app
from tokenmill.server.config import ServerConfig
from tokenmill.server.connections.listener import address_of, bind

CONFIG = ServerConfig(port=0, served_model_name=("scripted",))


class Started:
    """A server that runs in this event loop."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._stack = contextlib.ExitStack()
        listener = self._stack.enter_context(bind(CONFIG))
        self.address = address_of(CONFIG, listener)
        self.status = asyncio.create_task(server_app._serve(EngineConfig(), CONFIG, listener))
        self.status.add_done_callback(lambda _: self._stack.close())

    def announced(self) -> str:
        """What was printed since it was last asked."""
        return self._capsys.readouterr().out

    async def ready(self, http: httpx2.AsyncClient) -> None:
        """Waits until it is announced; it answers before."""
        while (await http.get("/readyz")).status_code != 200:
            pass
        while not (line := self.announced()):
            await asyncio.sleep(0)
        assert line == f"Serving scripted on {self.address}\n"


@pytest.fixture
def start(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, llm: Any) -> Callable[..., Started]:
    def starting(loading: Callable[[], Awaitable[Any]] = llm.load) -> Started:
        llm.load = loading
        monkeypatch.setattr(server_app, "AsyncLLM", lambda *_: llm)
        return Started(capsys)

    return starting


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_then_ends(start: Any, llm: Any, number: int) -> None:
    before = signal.getsignal(number)
    server = start()
    async with httpx2.AsyncClient(base_url=server.address) as http:
        await server.ready(http)
        os.kill(os.getpid(), number)
        while (await http.get("/readyz")).status_code == 200:
            pass
        assert (await http.get("/readyz")).json()["status"] == "draining"
        assert (await http.get("/livez")).status_code == 200
        assert llm.refusing
        assert not server.status.done()
        llm.drained.set()
        assert await server.status == 0
    assert llm.closed
    assert signal.getsignal(number) == before


async def test_a_second_signal_does_not_wait_for_the_drain(start: Any, llm: Any) -> None:
    server = start()
    async with httpx2.AsyncClient(base_url=server.address) as http:
        await server.ready(http)
        terminate()
        while (await http.get("/readyz")).status_code == 200:
            pass
        terminate()
        assert await server.status == 0
    assert llm.closed
    assert not llm.drained.is_set()


async def test_a_signal_after_a_drain_that_was_asked_for_only_ends_its_delay(start: Any, llm: Any) -> None:
    server = start()
    async with httpx2.AsyncClient(base_url=server.address) as http:
        await server.ready(http)
        await http.post("/admin/drain", params={"delay_s": 3600})
        assert not llm.refusing
        terminate()
        while not llm.refusing:
            await asyncio.sleep(0)
        assert (await http.get("/livez")).status_code == 200
        llm.drained.set()
        assert await server.status == 0


async def test_it_answers_while_the_model_loads(start: Any, llm: Any) -> None:
    loaded = asyncio.Event()
    llm.state = Health(False, "", 0.0, 0, 0, phase="weights", percent=50.0)
    server = start(loaded.wait)
    async with httpx2.AsyncClient(base_url=server.address) as http:
        answer = await http.get("/startupz")
        assert (answer.status_code, answer.json()) == (
            503, {"status": "starting", "phase": "weights", "percent": 50.0},
        )  # fmt: skip
        assert (await http.get("/livez")).status_code == 200
        assert not server.announced()
        llm.state = Health(True, "", 0.0, 0, 0)
        loaded.set()
        await server.ready(http)
        llm.drained.set()
        terminate()
        assert await server.status == 0


async def test_a_model_that_cannot_be_loaded_ends_the_server(start: Any, llm: Any) -> None:
    async def load() -> None:
        raise ModelError("model_not_found", "There is no such model.")

    server = start(load)
    with pytest.raises(ModelError):
        await server.status
    assert llm.closed


async def test_a_signal_while_the_model_loads_ends_the_loading(start: Any, llm: Any) -> None:
    loading, gave_up = asyncio.Event(), asyncio.Event()

    async def load() -> None:
        try:
            loading.set()
            await asyncio.Event().wait()
        finally:
            gave_up.set()

    llm.drained.set()
    server = start(load)
    await loading.wait()
    terminate()
    assert await server.status == 0
    assert gave_up.is_set()
    assert not server.announced()


def test_an_address_that_is_taken_is_known_before_the_model_loads() -> None:
    with bind(CONFIG) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            server_app.serve(EngineConfig(), ServerConfig(port=port))
    assert (caught.value.code, caught.value.field) == ("address_unavailable", "port")


def test_an_unknown_host() -> None:
    with pytest.raises(ConfigError) as caught:
        server_app.serve(EngineConfig(), ServerConfig(host="no.such.host.invalid"))
    assert caught.value.code == "address_unavailable"
