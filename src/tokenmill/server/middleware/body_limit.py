"""Refuses request bodies that are too large, before anything parses them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenmill.errors import RequestError
from tokenmill.server.errors import response_of

__all__ = ["BodyLimit"]


class BodyLimit:
    """Reads the whole body, as every route would, and stops as soon as it exceeds the limit.

    Args:
        limit: bytes.
        uploads: limits of the paths whose bodies are not read here: their routes put them on the disk as they come.
    """

    def __init__(self, app: ASGIApp, limit: int, uploads: Mapping[str, int] = MappingProxyType({})) -> None:
        self._app = app
        self._limit = limit
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] in self._uploads:
            await self._app(scope, _counted(receive, self._uploads[scope["path"]]), send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        body = bytearray()
        complete = announced.isdecimal() and int(announced) > self._limit  # then it is not even read
        while not complete and len(body) <= self._limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            complete = not message.get("more_body", False)
        if len(body) > self._limit or (announced.isdecimal() and int(announced) > self._limit):
            await response_of(_too_large(self._limit), scope["path"])(scope, receive, send)
            return

        replayed = False

        async def receive_again() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, receive_again, send)


def _counted(receive: Receive, limit: int) -> Receive:
    """`receive`, which raises ``body_too_large`` into the route that reads more than `limit` bytes."""
    came = 0

    async def counting() -> Message:
        nonlocal came
        message = await receive()
        came += len(message.get("body", b""))
        if came > limit:
            raise _too_large(limit)
        return message

    return counting


def _too_large(limit: int) -> RequestError:
    return RequestError("body_too_large", f"The body is larger than {limit} bytes.")
