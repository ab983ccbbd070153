"""Refuses request bodies that are too large, before anything parses them."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenmill.errors import RequestError
from tokenmill.server.errors import response_of

__all__ = ["BodyLimit"]


class BodyLimit:
    """Reads the whole body, as every route would, and stops as soon as it exceeds the limit.

    Args:
        limit: bytes.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
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
            refusal = RequestError("body_too_large", f"The body is larger than {self._limit} bytes.")
            await response_of(refusal, scope["path"])(scope, receive, send)
            return

        replayed = False

        async def receive_again() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, receive_again, send)
