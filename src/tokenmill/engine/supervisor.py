"""Keeps an engine process alive: starts it, sees it crash or hang, reports that, and starts it again.

A crash costs the requests that were open, never the server. Each further crash within a minute of the last start waits
twice as long for the next one, so that an engine that cannot live does not take the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import logging
import time
from collections.abc import Callable

from tokenmill.engine.client import EngineClient
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.crash import Reports, ending
from tokenmill.engine.events import Event
from tokenmill.engine.messages import Refused, Step
from tokenmill.errors import EngineError, TokenmillError, UnavailableError
from tokenmill.types import EngineRequest, EngineStats

__all__ = ["Phase", "Supervisor"]

_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0
_STABLE_S = 60.0
_logger = logging.getLogger(__name__)


class Phase(enum.StrEnum):
    """Where the engine is in its life."""

    TOKENIZER = "tokenizer"
    """The model's folder is looked up, or downloaded, and its tokenizer read."""
    WEIGHTS = "weights"
    """The weights are loaded."""
    MEMORY = "memory"
    """The KV memory is laid out."""
    READY = "ready"
    RESTARTING = "restarting"
    """The process has died and comes back."""
    CLOSED = "closed"


@dataclasses.dataclass
class _Open:
    """A request that the engine has not ended."""

    prompt_tokens: int
    generated_tokens: int = 0


class Supervisor:
    """One engine, in whichever process it is now. All methods belong to one event loop.

    Args:
        on_report: told of every step and refusal, in order.
        on_death: told when a process ended unasked; its open requests are lost.
        reports: where crashes are written down.

    Attributes:
        percent: how much of the weights is loaded.
        reason: why the engine is away; empty while it is not.
        restarts: how often it has come back, or tried to.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_report: Callable[[Step | Refused], None],
        on_death: Callable[[EngineError], None],
        reports: Reports,
    ) -> None:
        self._config = config
        self._on_report = on_report
        self._on_death = on_death
        self._reports = reports
        self._client: EngineClient | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._open: dict[str, _Open] = {}
        self._busy_since = 0.0
        self._back_at = 0.0
        self._load_s = 0.0
        self.stats = EngineStats()
        self.phase = Phase.TOKENIZER
        self.percent = 0.0
        self.reason = ""
        self.restarts = 0

    async def start(self) -> None:
        """Starts the engine and waits until the model is loaded.

        Raises:
            TokenmillError: whatever kept the engine from starting; it is not tried again.
        """
        await self._start()
        self._keeping = asyncio.create_task(self._keep())

    async def _start(self) -> EngineClient:
        began = time.monotonic()
        if self.phase is not Phase.RESTARTING:
            self.phase = Phase.WEIGHTS
        self.percent = 0.0
        client = await EngineClient.start(self._config, self._report, self._progress)
        self._load_s = time.monotonic() - began
        self._client, self.stats = client, client.stats
        self.phase, self.percent, self.reason = Phase.READY, 100.0, ""
        return client

    def _progress(self, done: int, total: int) -> None:
        self.percent = 100.0 * done / max(total, 1)
        if done >= total and self.phase is Phase.WEIGHTS:
            self.phase = Phase.MEMORY

    async def _keep(self) -> None:
        """Waits for the process to end, and brings it back, for ever."""
        delay = _FIRST_DELAY_S
        while self._client is not None:
            started = time.monotonic()
            hung = await self._until_lost(self._client)
            if time.monotonic() - started > _STABLE_S:
                delay = _FIRST_DELAY_S
            await self._lose(self._client, hung)
            self._client = None
            while self._client is None:
                self._back_at = time.monotonic() + delay + self._load_s
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY_S)
                self.restarts += 1
                try:
                    await self._start()
                except (TokenmillError, OSError) as error:
                    self.reason = f"The engine does not come back: {error}"
                    _logger.error("the engine does not come back: %s", error)

    async def _until_lost(self, client: EngineClient) -> str:
        """Returns when the process has ended; says why if it was made to."""
        timeout = self._config.hang_timeout_s
        ended = asyncio.ensure_future(client.ended())
        try:
            while True:
                left = timeout - self.stalled_s if timeout else None
                if left is not None and left <= 0:
                    reason = f"No step has ended for {self.stalled_s:.3g} s; the engine was killed."
                    await client.kill()
                    await ended
                    return reason
                # While nothing is open nothing can stall before `timeout` has passed once more.
                await asyncio.wait((ended,), timeout=left)
                if ended.done():
                    return ""
        finally:
            ended.cancel()

    @property
    def stalled_s(self) -> float:
        """Seconds since a step ended or work arrived; 0 while there is none."""
        if not self._open:
            return 0.0
        return max(0.0, time.monotonic() - max(self.stats.last_progress, self._busy_since))

    async def _lose(self, client: EngineClient, hung: str) -> None:
        """Tells everybody that a process is gone, and writes down what is known."""
        status = await client.ended()
        lost, self._open = self._open, {}
        self.phase = Phase.RESTARTING
        self.reason = hung or f"The engine process ended unexpectedly ({ending(status)})."
        self._back_at = time.monotonic() + self._load_s
        self._on_death(EngineError("engine_died", self.reason))
        _logger.error("%s %d requests were lost.", self.reason, len(lost))
        writing = asyncio.ensure_future(self._write_down(client, status, lost))
        try:
            await asyncio.shield(writing)
        finally:  # a server that is asked to end meanwhile still leaves the report
            await writing
        await client.close()

    async def _write_down(self, client: EngineClient, status: int, lost: dict[str, _Open]) -> None:
        requests = {name: dataclasses.asdict(request) for name, request in lost.items()}
        try:
            file = await asyncio.to_thread(
                self._reports.write, client.folder, reason=self.reason, status=status, config=self._config,
                stats=self.stats, requests=requests,
            )  # fmt: skip
            if file is not None:
                _logger.error("what is known about it is in %s", file)
        except OSError as error:
            _logger.error("the crash report could not be written: %s", error)

    def _report(self, report: Step | Refused) -> None:
        if isinstance(report, Refused):
            self._open.pop(report.request_id, None)
        else:
            self.stats = report.stats
            for output in report.outputs:
                if output.finish_reason is not None:
                    self._open.pop(output.request_id, None)
                elif request := self._open.get(output.request_id):
                    request.generated_tokens += len(output.token_ids)
        self._on_report(report)

    def check(self) -> None:
        """Says whether requests can be taken now.

        Raises:
            UnavailableError: ``starting`` or ``engine_restarting``.
        """
        if self.phase is Phase.READY:
            return
        if self.phase is Phase.RESTARTING:
            left = max(1.0, self._back_at - time.monotonic())
            raise UnavailableError(
                "engine_restarting", f"The engine is being restarted. {self.reason}", retry_after_s=left
            )
        if self.phase is Phase.CLOSED:
            raise UnavailableError("shutting_down", "The server is shutting down; send the request to another.")
        raise UnavailableError("starting", f"The model is still loading ({self.phase}, {self.percent:.0f} %).")

    async def add(self, request: EngineRequest) -> None:
        """Hands a request over; a refusal comes as a report.

        Raises:
            UnavailableError, EngineError: there is no engine.
        """
        if not self._open:
            self._busy_since = time.monotonic()
        self._open[request.request_id] = _Open(len(request.prompt_token_ids))
        await self._running().add(request)

    async def abort(self, request_ids: list[str]) -> None:
        """Gives requests up; those still under way end with reason `abort`."""
        await self._running().abort(request_ids)

    async def events(self, request_id: str = "") -> list[Event]:
        """The engine's decisions about one request, or all that are kept since it was last started."""
        return await self._running().events(request_id)

    def _running(self) -> EngineClient:
        self.check()
        assert self._client is not None
        return self._client

    async def close(self) -> None:
        """Ends the process for good."""
        self.phase = Phase.CLOSED
        if self._keeping is not None:
            self._keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping
        if self._client is not None:
            await self._client.close()
