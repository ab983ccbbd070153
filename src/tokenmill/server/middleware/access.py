"""Lets a request in by its key, before anything reads its body."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenmill.errors import RequestError
from tokenmill.server.errors import response_of
from tokenmill.server.principal import ANYONE, Principal

__all__ = ["Access", "scope_of"]

_OPEN = frozenset({"/livez", "/readyz", "/startupz", "/health"})
"""What a load balancer asks. It tells whether the server is well, and nothing about anyone."""


def scope_of(path: str) -> str | None:
    """The scope that a key needs for `path`; None where no key is needed. Unknown paths need one like all others."""
    if path in _OPEN:
        return None
    if path == "/metrics":
        return "metrics"
    return "admin" if path == "/admin" or path.startswith("/admin/") else "inference"


class Access:
    """Finds out who asks, puts it into ``request.state.principal``, and refuses whoever may not.

    Args:
        recognize: whose key this is; None when it is nobody's.
        admin_port: the port on which alone /admin and /metrics are; None when they are with all else.
    """

    def __init__(
        self, app: ASGIApp, recognize: Callable[[str], Principal | None], admin_port: int | None = None
    ) -> None:
        self._app = app
        self._recognize = recognize
        self._admin_port = admin_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["principal"] = self._admit(scope)
        except RequestError as error:
            response = response_of(error, scope["path"])
            if error.code == "invalid_api_key":
                response.headers["www-authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> Principal:
        path = scope["path"]
        needed = scope_of(path)
        if needed is None:
            return ANYONE
        on_admin_port = (scope.get("server") or ("", None))[1] == self._admin_port
        if self._admin_port is not None and on_admin_port != (needed in ("admin", "metrics")):
            raise RequestError("not_found", f"{path} is not on this port.")
        principal = self._recognize(_secret(Headers(scope=scope)))
        if principal is None:
            raise RequestError(
                "invalid_api_key", "There is no valid key in the header Authorization (Bearer) or x-api-key."
            )
        if needed not in principal.scopes:
            raise RequestError("insufficient_scope", f"This key has no scope {needed!r}, which {path} needs.")
        return principal


def _secret(headers: Headers) -> str:
    """The key as OpenAI's clients send it, else as Anthropic's do."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
