"""What travels between the engine process and its client, as msgpack. One tagged union in each direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.events import Event
from tokenmill.errors import RequestError, UnavailableError
from tokenmill.types import EngineOutput, EngineRequest, EngineStats, ErrorInfo

__all__ = [
    "Abort",
    "Add",
    "AskEvents",
    "Command",
    "Events",
    "Failed",
    "Loading",
    "Ready",
    "Refused",
    "Report",
    "Start",
    "Step",
    "Stop",
    "address_in",
]


def address_in(folder: Path) -> str:
    """Where client and engine meet, in a folder that both know."""
    return f"ipc://{folder / 'engine'}"


class Start(msgspec.Struct, frozen=True, tag=True):
    """First message: what to serve."""

    config: EngineConfig


class Add(msgspec.Struct, frozen=True, tag=True):
    """Take this request."""

    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Give these requests up."""

    request_ids: list[str]


class AskEvents(msgspec.Struct, frozen=True, tag=True):
    """Report the events of one request, or all that are kept when the id is empty."""

    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the process now."""


Command = Start | Add | Abort | AskEvents | Stop


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Weights loaded so far, in bytes."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded."""

    stats: EngineStats


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start. `kind` is the class of the error."""

    kind: str
    error: ErrorInfo


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request was not taken."""

    request_id: str
    error: ErrorInfo

    def reason(self) -> RequestError | UnavailableError:
        """Why, as it was raised in the engine."""
        error = self.error
        if error.retry_after_s is None:
            return RequestError(error.code, error.message, error.field)
        return UnavailableError(error.code, error.message, error.field, error.retry_after_s)


class Step(msgspec.Struct, frozen=True, tag=True):
    """What the latest steps and aborts brought."""

    outputs: list[EngineOutput]
    """In order; what several steps brought to one request is one output."""
    stats: EngineStats
    """After the last of them."""
    steps: list[tuple[int, float]] = []
    """Tokens and seconds of each step."""


class Events(msgspec.Struct, frozen=True, tag=True):
    """Answer to `AskEvents`."""

    request_id: str
    events: list[Event]


Report = Loading | Ready | Failed | Refused | Step | Events

encode = msgspec.msgpack.Encoder().encode
decode_command: Any = msgspec.msgpack.Decoder(Command).decode
decode_report: Any = msgspec.msgpack.Decoder(Report).decode
