"""Asks the server's own endpoints without a network: the way of a batch's lines."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Callable

import msgspec
from starlette.types import ASGIApp, Message, Scope

from tokenmill.errors import RequestError
from tokenmill.server.errors import body_of, status_of
from tokenmill.server.principal import Principal

__all__ = ["Answer", "Loopback"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an endpoint answered."""

    status: int
    request_id: str
    body: bytes


class Loopback:
    """Requests in the name of somebody who was let in before.

    Args:
        app: the endpoints, behind nothing that asks for keys.
        current: what somebody may now; None when the key was revoked or has expired.
    """

    def __init__(self, app: ASGIApp, current: Callable[[Principal], Principal | None]) -> None:
        self._app = app
        self._current = current

    async def post(self, path: str, body: bytes, principal: Principal, priority: int) -> Answer:
        """One request with a JSON body.

        Args:
            priority: takes the place of what the body says.
        """
        now = self._current(principal)
        if now is None:
            error = RequestError("invalid_api_key", "The key that asked for this is not valid any more.")
            return Answer(status_of(error), uuid.uuid4().hex, msgspec.json.encode(body_of(error)))
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "server": ("loopback", None),
            "client": None,
            "state": {"principal": now, "priority": priority},
        }
        unread = [body]
        status, request_id, pieces = 500, "", bytearray()

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await asyncio.Event().wait()  # nobody disconnects; whoever waits for it is cancelled
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = dict(message["headers"]).get(b"x-request-id", b"").decode()
            else:
                pieces.extend(message.get("body", b""))

        await self._app(scope, receive, send)
        return Answer(status, request_id, bytes(pieces))
