"""What a call has for its caller, between a process that makes it and a client that may be slow to take it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, Protocol, TypeVar

from tokenmill.types import CompletionOutput, RequestOutput

__all__ = ["Mailbox"]


class _Emitter(Protocol):
    """A call."""

    output: RequestOutput

    def emit(self, new: list[CompletionOutput]) -> RequestOutput:
        """What its caller sees of new pieces."""


C = TypeVar("C", bound=_Emitter)


class Mailbox(Generic[C]):
    """What a call has for its caller. Pieces that come faster than they are fetched become one: it cannot grow."""

    def __init__(self, call: C) -> None:
        self.call = call
        self._new: dict[int, CompletionOutput] = {}
        self._error: Exception | None = None
        self._wake = asyncio.Event()

    def put(self, new: CompletionOutput) -> None:
        held = self._new.setdefault(new.index, new)
        if held is not new:
            held.text += new.text
            held.token_ids += new.token_ids
            if new.logprobs is not None:
                held.logprobs = (held.logprobs or []) + new.logprobs
            held.finish_reason, held.stop_reason, held.error = new.finish_reason, new.stop_reason, new.error
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """Ends the call, after what has come before."""
        self._error = error
        self._wake.set()

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """Everything to the end of the call."""
        while not self.call.output.finished or self._new:
            await self._wake.wait()
            self._wake.clear()
            if self._new:
                new, self._new = list(self._new.values()), {}
                yield self.call.emit(new)
            if self._error is not None:
                raise self._error
