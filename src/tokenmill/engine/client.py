"""Starts the engine process and talks to it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.asyncio

from tokenmill import errors
from tokenmill.engine import messages
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.events import Event
from tokenmill.engine.executor import Progress
from tokenmill.errors import EngineError, TokenmillError
from tokenmill.types import EngineRequest, EngineStats, ErrorInfo

__all__ = ["EngineClient"]

_STOP_TIMEOUT_S = 5.0
_LAST_WORDS_S = 1.0
_STACKS_TIMEOUT_S = 2.0


class EngineClient:
    """One engine process. Use `start`; all methods belong to the event loop that called it.

    Attributes:
        stats: the engine's state after its latest step.
        folder: what the two share while the client is open.
    """

    def __init__(self, process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket, folder: Path) -> None:
        self._process = process
        self._socket = socket
        self._receiving: asyncio.Task[None] | None = None
        self._asked: dict[str, asyncio.Future[list[Event]]] = {}
        self.folder = folder
        self.stats: EngineStats

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        on_report: Callable[[messages.Step | messages.Refused], None],
        progress: Progress | None = None,
    ) -> EngineClient:
        """Starts the process and waits until the model is loaded.

        Args:
            on_report: told of every step and refusal, in order.

        Raises:
            TokenmillError: whatever kept the engine from starting.
        """
        folder = Path(tempfile.mkdtemp(prefix="tokenmill-"))
        socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)  # what is sent waits for the engine's next look, however much it is
        socket.bind(messages.address_in(folder))
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "tokenmill.engine.process", str(folder))
        client = cls(process, socket, folder)
        try:
            await socket.send(messages.encode(messages.Start(config)))
            await client._ready(progress)
        except BaseException:
            await client.close()
            raise
        client._receiving = asyncio.create_task(client._receive(on_report))
        return client

    async def _ready(self, progress: Progress | None) -> None:
        ended = asyncio.ensure_future(self._process.wait())
        try:
            while True:
                received = asyncio.ensure_future(self._socket.recv())
                await asyncio.wait((received, ended), return_when=asyncio.FIRST_COMPLETED)
                if not received.done():  # its last words may still be on the way
                    await asyncio.wait((received,), timeout=_LAST_WORDS_S)
                if not received.done():
                    received.cancel()
                    raise EngineError(
                        "engine_start_failed", f"The engine process ended with status {self._process.returncode}."
                    )
                match messages.decode_report(received.result()):
                    case messages.Loading(done, total):
                        if progress is not None:
                            progress(done, total)
                    case messages.Ready(stats):
                        self.stats = stats
                        return
                    case messages.Failed(kind, info):
                        raise _error(kind, info)
        finally:
            ended.cancel()

    async def _receive(self, on_report: Callable[[messages.Step | messages.Refused], None]) -> None:
        while True:
            report = messages.decode_report(await self._socket.recv())
            if isinstance(report, messages.Events):
                asked = self._asked.pop(report.request_id, None)
                if asked is not None and not asked.done():
                    asked.set_result(report.events)
                continue
            if isinstance(report, messages.Step):
                self.stats = report.stats
            on_report(report)

    @property
    def pid(self) -> int:
        """The engine process."""
        return self._process.pid

    async def ended(self) -> int:
        """Waits until the process has ended; returns its exit status, a signal as a negative number."""
        status = await self._process.wait()
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(EngineError("engine_died", "The engine process has ended."))
        return status

    async def kill(self) -> None:
        """Ends a process that answers no more: so that it writes down its stacks if it can, else in any case."""
        for number in (signal.SIGABRT, signal.SIGCONT):  # one that was stopped gets the first with the second
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _STACKS_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def add(self, request: EngineRequest) -> None:
        """Hands a request over; a refusal comes as a report."""
        await self._send(messages.Add(request))

    async def abort(self, request_ids: list[str]) -> None:
        """Gives requests up; those still under way end with reason `abort`."""
        await self._send(messages.Abort(request_ids))

    async def events(self, request_id: str = "") -> list[Event]:
        """The engine's decisions about one request, or all that are kept."""
        if request_id not in self._asked:
            self._asked[request_id] = asyncio.get_running_loop().create_future()
            await self._send(messages.AskEvents(request_id))
        return await asyncio.shield(self._asked[request_id])

    async def _send(self, command: messages.Command) -> None:
        try:
            await self._socket.send(messages.encode(command), zmq.NOBLOCK)
        except zmq.Again:  # nobody is connected at the other end
            raise EngineError("engine_died", "The engine process has ended.") from None

    async def close(self) -> None:
        """Ends the process: asks, then terminates, then kills."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
        if self._process.returncode is None:
            with contextlib.suppress(zmq.ZMQError, TokenmillError):
                await self._send(messages.Stop())
            for force in (None, self._process.terminate, self._process.kill):
                if force is not None:
                    force()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
                    break
        self._socket.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _error(kind: str, info: ErrorInfo) -> TokenmillError:
    """The error that the engine process reported, as it was raised there."""
    cls = getattr(errors, kind, EngineError)
    error: TokenmillError = EngineError(info.code, info.message, info.field)
    if isinstance(cls, type) and issubclass(cls, TokenmillError) and cls is not errors.MissingDependencyError:
        error = cls(info.code, info.message, info.field)
    return error
