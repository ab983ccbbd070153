"""What becomes of one HTTP request, gathered while it is served: for its line in the log, its counts and its trace."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, MutableMapping
from typing import Any

from tokenmill.server.call import Call, Outcome

__all__ = ["Record", "current", "enter", "leave"]


class Record:
    """One HTTP request. Everything that runs on its behalf finds it through `current`.

    Args:
        state: the request's state, which the middleware fill.
    """

    def __init__(self, state: MutableMapping[str, Any]) -> None:
        self._state = state
        self.calls: list[tuple[Call, Outcome]] = []
        """The calls that have ended."""
        self.open = True
        """Until the answer is sent. What ends later, in the background, is told for itself."""
        self.on_parse: Callable[[float, float, int], None] | None = None
        """Told when an answer was read for tool calls: start, end, and how many there were. Set while traced."""

    @property
    def request_id(self) -> str:
        """The id that the answer carries."""
        return str(self._state.get("request_id", ""))

    @property
    def error_code(self) -> str:
        """Code of the error that was the answer; empty when it was none."""
        return str(self._state.get("error_code", ""))


_CURRENT: contextvars.ContextVar[Record | None] = contextvars.ContextVar("record", default=None)


def current() -> Record | None:
    """The record of the HTTP request that this code works for."""
    return _CURRENT.get()


def enter(record: Record) -> contextvars.Token[Record | None]:
    """Makes `record` the current one, for this task and those it starts."""
    return _CURRENT.set(record)


def leave(token: contextvars.Token[Record | None]) -> None:
    """Undoes `enter`."""
    _CURRENT.reset(token)
