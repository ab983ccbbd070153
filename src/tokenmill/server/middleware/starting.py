"""Refuses requests for a model that is still loading."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenmill.errors import UnavailableError
from tokenmill.llm import AsyncLLM
from tokenmill.server.errors import response_of

__all__ = ["PROBES", "Starting"]

PROBES = frozenset({"/livez", "/readyz", "/startupz", "/health"})
"""Paths that always answer."""


class Starting:
    """Lets only those paths through that need no model."""

    def __init__(self, app: ASGIApp, llm: AsyncLLM) -> None:
        self._app = app
        self._llm = llm

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _needs_no_model(scope["path"]):
            await self._app(scope, receive, send)
            return
        health = self._llm.health()
        error = UnavailableError("starting", f"The model is still loading ({health.phase}, {health.percent:.0f} %).")
        await response_of(error, scope["path"])(scope, receive, send)


def _needs_no_model(path: str) -> bool:
    return path in PROBES or path == "/metrics" or path.startswith("/admin/")
