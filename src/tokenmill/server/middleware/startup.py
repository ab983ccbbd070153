"""Refuses requests for a model that is still loading."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenmill.errors import UnavailableError
from tokenmill.llm import AsyncLLM
from tokenmill.observer import LOADING
from tokenmill.server.errors import response_of

__all__ = ["PROBES", "Startup"]

PROBES = frozenset({"/livez", "/readyz", "/startupz", "/health"})
"""Paths that always answer."""


class Startup:
    """Lets only those paths through that need no model, until there is one."""

    def __init__(self, app: ASGIApp, llm: AsyncLLM) -> None:
        self._app = app
        self._llm = llm

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _needs_no_model(scope["path"]):
            health = self._llm.health()
            if health.phase in LOADING:
                error = UnavailableError(
                    "starting", f"The model is still loading ({health.phase}, {health.percent:.0f} %)."
                )
                await response_of(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _needs_no_model(path: str) -> bool:
    return path in PROBES or path in ("/metrics", "/version", "/openapi.json") or path.startswith("/admin/")
