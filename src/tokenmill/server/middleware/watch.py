"""Sees every HTTP request from outside: counts it, times it and writes its line in the log."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenmill.server.observability.logs import request_line
from tokenmill.server.observability.metrics import Metrics
from tokenmill.server.observability.record import Record, enter, leave

__all__ = ["Watch"]


class Watch:
    """The outermost middleware, so that whatever refuses a request is seen by it.

    Args:
        metrics: told of each request.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        record = Record(scope.setdefault("state", {}))
        token = enter(record)
        status = 499  # the client left before there was an answer

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.monotonic() - begun
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.answered(route, scope["method"], status, record.error_code, seconds)
            request_line(record, scope["method"], scope["path"], status, seconds)
            record.open = False
            leave(token)
