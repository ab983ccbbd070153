"""Server-sent events. The fields that all events of an answer share are encoded once.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import msgspec

from tokenmill.types import JSON

__all__ = ["DONE", "Framer", "event"]

DONE = b"data: [DONE]\n\n"
"""Ends a stream that is complete (OpenAI's convention)."""

_encoder = msgspec.json.Encoder()


def event(fields: JSON, name: str = "") -> bytes:
    """One event, with a name if it has one."""
    data = b"data: " + _encoder.encode(fields) + b"\n\n"
    return f"event: {name}\n".encode() + data if name else data


class Framer:
    """Makes the events of one answer.

    Args:
        shared: what each event begins with; not empty.
    """

    def __init__(self, shared: JSON) -> None:
        self._head = b"data: " + _encoder.encode(shared)[:-1] + b","

    def event(self, fields: JSON) -> bytes:
        """An event of the shared fields and these, which must not be empty."""
        return self._head + _encoder.encode(fields)[1:] + b"\n\n"
