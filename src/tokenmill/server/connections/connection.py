"""One client's connection, which may take no more of the server than its share.

uvicorn parses HTTP and runs the app; what it leaves to a proxy is added here: a limit on the size of the head, on the
time a request takes to arrive, on the time a client may leave what is sent to it unread, and on open connections.
"""

from __future__ import annotations

import asyncio
import http
from typing import Any

import msgspec
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tokenmill.errors import RequestError, TokenmillError, UnavailableError
from tokenmill.server.config import ServerConfig
from tokenmill.server.errors import body_of, response_of, status_of
from tokenmill.server.middleware.startup import PROBES

__all__ = ["Connection"]

_SEPARATORS = 4
"""Bytes of a header line beside name and value."""


class Connection(HttpToolsProtocol):
    """Uvicorn's protocol with limits.

    Args:
        limits: where they are configured.
        uvicorn: arguments of uvicorn's own protocol.
    """

    def __init__(self, limits: ServerConfig, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits = limits
        self._largest_head = limits.max_header_kib * 1024
        self._head = 0
        self._in_head = True
        self._arriving: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._arriving)
        _cancel(self._unread)
        super().connection_lost(exc)

    # ---- what arrives ---------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head += len(data)
            if self._head > self._largest_head:
                self._end_with(self._too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._in_head = 0, True
        self._await_request()

    def on_headers_complete(self) -> None:
        self._in_head = False
        app = self.app
        self.app = self._refusal() or app
        super().on_headers_complete()
        self.app = app

    def on_message_complete(self) -> None:
        self._head, self._in_head = 0, False
        _cancel(self._arriving)
        super().on_message_complete()

    def _refusal(self) -> Response | None:
        """The answer to a request that is not served, once its head is known."""
        error: TokenmillError
        size = len(self.url) + sum(len(name) + len(value) + _SEPARATORS for name, value in self.headers)
        path = self.url.partition(b"?")[0].decode("latin-1")
        if size > self._largest_head:
            error = self._too_large()
        elif len(self.connections) > self._limits.max_connections and path not in PROBES:
            error = UnavailableError("too_many_connections", "Too many connections are open; ask again later.")
        else:
            return None
        response = response_of(error, path)
        response.headers["connection"] = "close"
        return response

    def _too_large(self) -> RequestError:
        return RequestError("headers_too_large", f"The request's head is larger than {self._largest_head} bytes.")

    def _await_request(self) -> None:
        """From now on a whole request must arrive in time."""
        _cancel(self._arriving)
        self._arriving = self.loop.call_later(self._limits.body_timeout_s, self._not_arrived)

    def _not_arrived(self) -> None:
        if self.flow.read_paused:  # it is the server that does not read
            self._await_request()
        elif self._in_head and self._head == 0:
            self.transport.close()  # nothing was asked
        else:
            seconds = self._limits.body_timeout_s
            self._end_with(RequestError("body_too_slow", f"The request did not arrive within {seconds:g} seconds."))

    def _end_with(self, error: TokenmillError) -> None:
        """Closes the connection; says why if no answer has begun."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            status, body = status_of(error), msgspec.json.encode(body_of(error))
            head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()

    # ---- what is sent ---------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        _cancel(self._unread)
        self._unread = self.loop.call_later(self._limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._unread)
        super().resume_writing()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
