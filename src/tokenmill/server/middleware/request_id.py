"""Gives each HTTP request an id, and keeps our mistakes from reaching the client."""

from __future__ import annotations

import logging
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenmill.server.errors import internal_error, response_of

__all__ = ["RequestId"]

_LONGEST = 128
_logger = logging.getLogger(__name__)


class RequestId:
    """Echoes the caller's ``x-request-id`` or makes one; it is in ``request.state.request_id`` and in every answer.

    What is put into ``request.state.headers`` until the answer begins goes out with it.

    An exception that nobody expected is logged with the id and answered with ``internal_error``; if the answer has
    begun, the connection is closed so that the client cannot take it for complete.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if 0 < len(given) <= _LONGEST and given.isprintable() else uuid.uuid4().hex
        headers: dict[str, str] = {}
        scope.setdefault("state", {}).update(request_id=request_id, headers=headers)
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message).update({"x-request-id": request_id, **headers})
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            _logger.exception("request %s failed", request_id)
            if begun:
                raise
            await response_of(internal_error(request_id), scope["path"])(scope, receive, send_with_id)
