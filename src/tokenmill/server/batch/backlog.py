"""What goes on when no client waits for it: batches, responses in the background, and the end of what has expired."""

from __future__ import annotations

import asyncio
import logging
from typing import cast

from starlette.requests import Request

from tokenmill.errors import TokenmillError
from tokenmill.server.batch.batches import Batches
from tokenmill.server.batch.files import Files
from tokenmill.server.batch.loopback import Loopback
from tokenmill.server.config import KeepConfig
from tokenmill.server.conversation.responses import Responses
from tokenmill.server.service import Service
from tokenmill.server.state import State

__all__ = ["Backlog", "backlog_of"]

_SWEEP_S = 3600.0
_logger = logging.getLogger(__name__)


class Backlog:
    """The kept objects of a server and the work on them.

    Args:
        endpoints: the server's own.
    """

    def __init__(self, state: State, service: Service, endpoints: Loopback, config: KeepConfig) -> None:
        self._state = state
        self.files = Files(state)
        self.batches = Batches(
            state,
            self.files,
            endpoints,
            lambda: service.llm.stats.waiting,
            service.names,
            config.batch_concurrency,
        )
        self.responses = Responses(state, config.keep_responses_days * 86400.0)
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Goes on with what a server before this one left. Does nothing in a folder that was never used."""
        if self._state.exists:
            try:
                await self.responses.start()
                await self.batches.start()
            except TokenmillError as error:
                _logger.error("what was left cannot be gone on with: %s", error.message)
        self._sweeping = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Stops; what is not finished is left to the next server."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        await self.batches.close()
        await self.responses.close()
        await asyncio.to_thread(self._state.close)

    async def _sweep(self) -> None:
        while True:
            if self._state.exists:
                try:
                    for object_id in await asyncio.to_thread(self._state.sweep):
                        self.files.path(object_id).unlink(missing_ok=True)
                except (TokenmillError, OSError) as error:
                    _logger.warning("what has expired cannot be deleted: %s", error)
            await asyncio.sleep(_SWEEP_S)


def backlog_of(request: Request) -> Backlog:
    """The backlog of the app that took `request`."""
    return cast(Backlog, request.app.state.backlog)
