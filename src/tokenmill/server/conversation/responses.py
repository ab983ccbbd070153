"""Responses that are kept: conversations that go on by id, and answers that are made while nobody waits.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from tokenmill.errors import EngineError, RequestError, TokenmillError
from tokenmill.server.conversation.response_events import FINAL, ResponseWriter
from tokenmill.server.errors import internal_error
from tokenmill.server.sse import event as framed
from tokenmill.server.state import Order, State, Stored
from tokenmill.types import JSON, RequestOutput

__all__ = ["Making", "Responses"]

_KIND = "response"
_FIELD = "response_id"
_logger = logging.getLogger(__name__)


class Making:
    """A response that is to be made.

    Args:
        items: what the model is shown, in items: the conversation before, and the new input.
        previous: how many of them are of the conversation before.
    """

    def __init__(
        self,
        writer: ResponseWriter,
        outputs: AsyncGenerator[RequestOutput, None],
        owner: str,
        items: list[JSON],
        previous: int,
    ) -> None:
        self.writer = writer
        self.outputs = outputs
        self.owner = owner
        self.new_items = items[previous:]

    @property
    def id(self) -> str:
        """Name of the response."""
        return str(self.writer.response["id"])

    async def events(self) -> AsyncGenerator[JSON, None]:
        """Makes it.

        Raises:
            TokenmillError: it failed.
        """
        async with contextlib.aclosing(self.outputs):
            async for output in self.outputs:
                for event in self.writer.push(output):
                    yield event


class Responses:
    """The responses of all owners.

    Args:
        kept_s: how long a response is kept, and each one before it in its conversation; 0 keeps none.
    """

    def __init__(self, state: State, kept_s: float) -> None:
        self._state = state
        self._kept_s = kept_s
        self._runs: dict[str, _Run] = {}

    async def start(self) -> None:
        """Ends what a server before this one left in the middle."""
        for stored in await asyncio.to_thread(self._state.abandoned, _KIND):
            if await asyncio.to_thread(self._state.claim, stored):
                error = {"code": "server_error", "message": "The server ended while it made this response."}
                body = stored.body | {"status": "failed", "error": error}
                await asyncio.to_thread(self._state.update, stored.id, body, held=False)

    async def close(self) -> None:
        """Gives up what is being made."""
        runs = list(self._runs.values())
        for run in runs:
            run.task.cancel()
        await asyncio.gather(*(run.task for run in runs), return_exceptions=True)

    async def history(self, response_id: str | None, owner: str) -> list[JSON]:
        """The items of a conversation up to and including a response; they are now kept longer.

        Raises:
            RequestError: ``not_found`` when it, or one before it, is not kept; ``invalid_state`` when it has not ended.
        """
        if response_id is None:
            return []
        stored = await asyncio.to_thread(self._chain, response_id, owner)
        return [item for each in stored for item in (*each.private["input"], *_said(each.body["output"]))]

    def _chain(self, response_id: str, owner: str) -> list[Stored]:
        chain: list[Stored] = []
        next_id: str | None = response_id
        while next_id is not None:
            stored = self._state.get(_KIND, next_id, owner, "previous_response_id")
            if stored.body["status"] not in FINAL:
                raise RequestError(
                    "invalid_state", f"The response {next_id!r} has not ended yet.", "previous_response_id"
                )
            chain.append(stored)
            next_id = stored.body["previous_response_id"]
        self._state.extend([each.id for each in chain], time.time() + self._kept_s)
        return chain[::-1]

    @property
    def keeps(self) -> bool:
        """Whether responses are kept at all."""
        return self._kept_s > 0

    def check_kept(self, field: str) -> None:
        """Refuses what only a kept response can do.

        Raises:
            RequestError: ``unsupported_parameter``.
        """
        if not self.keeps:
            raise RequestError("unsupported_parameter", f"{field} needs kept responses; this server keeps none.", field)

    async def finish(self, making: Making) -> JSON:
        """Makes a response and keeps it if it should be.

        Raises:
            TokenmillError: it failed; nothing is kept then.
        """
        async with contextlib.aclosing(making.events()) as events:
            async for _ in events:
                pass
        await self._keep(making)
        return making.writer.response

    async def stream(self, making: Making) -> AsyncGenerator[bytes, None]:
        """The same as a stream of events. An error after the first one is the last one, ``response.failed``.

        Raises:
            TokenmillError: it failed before its first event.
        """
        writer = making.writer
        async with contextlib.aclosing(making.events()) as events:
            while not writer.ended():
                try:
                    event = await anext(events)
                    if writer.ended():
                        await self._keep(making)  # before the client can refer to it
                except Exception as error:
                    if not writer.begun and isinstance(error, TokenmillError):
                        raise
                    event = writer.fail(_told(error, making.id))
                    with contextlib.suppress(TokenmillError):
                        await self._keep(making)
                yield _frame(event)

    async def launch(self, making: Making) -> _Run:
        """Makes a response while nobody waits; it is kept from now on.

        Raises:
            UnavailableError: ``state_unavailable``.
        """
        run = _Run(making)
        run.add(making.writer.queue())
        await asyncio.to_thread(self._insert, making, held=True)
        self._runs[making.id] = run
        run.task = asyncio.create_task(self._make(run))
        return run

    async def _make(self, run: _Run) -> None:
        writer = run.making.writer
        try:
            async with contextlib.aclosing(run.making.events()) as events:
                async for event in events:
                    run.add([event])
            if not writer.ended():
                raise EngineError("engine_failed", "The engine ended without an answer.")
        except asyncio.CancelledError:
            run.add([writer.cancel()])
        except Exception as error:
            run.add([writer.fail(_told(error, run.making.id))])
        finally:
            try:
                await asyncio.to_thread(
                    self._state.update, run.making.id, writer.response, held=False, events=b"".join(run.events)
                )
            except TokenmillError as error:
                _logger.error("response %s cannot be kept: %s", run.making.id, error.message)
            finally:
                del self._runs[run.making.id]

    async def get(self, response_id: str, owner: str) -> JSON:
        """A response as it is now.

        Raises:
            RequestError: ``not_found``.
        """
        return (await self._stored(response_id, owner)).body

    async def _stored(self, response_id: str, owner: str) -> Stored:
        stored = await asyncio.to_thread(self._state.get, _KIND, response_id, owner, _FIELD)
        run = self._runs.get(response_id)
        if run is not None:
            stored.body.update(run.making.writer.response)
        return stored

    async def replay(self, response_id: str, owner: str, starting_after: int) -> AsyncGenerator[bytes, None]:
        """The events of a response in the background from one on, as far as they are there and then as they come.

        Args:
            starting_after: number of the last event that the caller knows; -1 for none.

        Raises:
            RequestError: ``not_found``; ``invalid_state`` when its events were not kept.
        """
        await asyncio.to_thread(self._state.get, _KIND, response_id, owner, _FIELD)
        run = self._runs.get(response_id)
        if run is not None:
            return run.follow(starting_after + 1)
        kept = await asyncio.to_thread(self._state.events, response_id)
        if kept is None:
            raise RequestError(
                "invalid_state", "Only a response made in the background can be streamed again.", "stream"
            )
        return _again(kept, starting_after + 1)

    async def cancel(self, response_id: str, owner: str) -> JSON:
        """Ends a response in the background; one that has ended stays as it is.

        Raises:
            RequestError: ``not_found``; ``invalid_state`` when it was not made in the background.
        """
        stored = await self._stored(response_id, owner)
        if not stored.body["background"]:
            raise RequestError("invalid_state", "Only a response made in the background can be cancelled.", _FIELD)
        await self._stop(response_id)
        return await self.get(response_id, owner)

    async def delete(self, response_id: str, owner: str) -> None:
        """Forgets a response; one that is being made is given up.

        Raises:
            RequestError: ``not_found``.
        """
        await asyncio.to_thread(self._state.get, _KIND, response_id, owner, _FIELD)
        await self._stop(response_id)
        await asyncio.to_thread(self._state.delete, _KIND, response_id, owner, _FIELD)

    async def input_items(
        self, response_id: str, owner: str, after: str | None, limit: int, order: Order
    ) -> tuple[list[JSON], bool]:
        """A part of what the model was shown, and whether there is more.

        Raises:
            RequestError: ``not_found``.
        """
        stored = await self._stored(response_id, owner)
        items = await self.history(stored.body["previous_response_id"], owner) + stored.private["input"]
        if order == "desc":
            items.reverse()
        if after is not None:
            ids = [item["id"] for item in items]
            if after not in ids:
                raise RequestError("not_found", f"There is no item {after!r}.", "after")
            items = items[ids.index(after) + 1 :]
        return items[:limit], len(items) > limit

    async def _stop(self, response_id: str) -> None:
        run = self._runs.get(response_id)
        if run is not None:
            run.task.cancel()
            await asyncio.gather(run.task, return_exceptions=True)

    async def _keep(self, making: Making) -> None:
        if making.writer.response["store"]:
            await asyncio.to_thread(self._insert, making, held=False)

    def _insert(self, making: Making, *, held: bool) -> None:
        self._state.insert(
            _KIND,
            making.id,
            making.owner,
            making.writer.response,
            private={"input": making.new_items},
            expires=time.time() + self._kept_s,
            held=held,
        )


class _Run:
    """A response in the background: its events so far, for whoever follows them."""

    task: asyncio.Task[None]

    def __init__(self, making: Making) -> None:
        self.making = making
        self.events: list[bytes] = []
        self._more = asyncio.Event()

    def add(self, events: Iterable[JSON]) -> None:
        """Takes new events."""
        for event in events:
            self.events.append(_frame(event))
        self._more.set()
        self._more = asyncio.Event()

    async def follow(self, first: int) -> AsyncGenerator[bytes, None]:
        """The events from one on, until the last."""
        while True:
            while first < len(self.events):
                yield self.events[first]
                first += 1
            if self.making.writer.ended():
                return
            await self._more.wait()


async def _again(kept: bytes, first: int) -> AsyncGenerator[bytes, None]:
    for event in kept.split(b"\n\n")[first:-1]:
        yield event + b"\n\n"


def _frame(event: JSON) -> bytes:
    return framed(event, event["type"])


def _told(error: BaseException, response_id: str) -> TokenmillError:
    """What a client learns about an error."""
    if isinstance(error, TokenmillError):
        return error
    _logger.error("response %s failed", response_id, exc_info=error)
    return internal_error(response_id)


def _said(output: Any) -> list[JSON]:
    """The items of an answer as input of the next one. What was cut off in the middle of a call is left out."""
    return [item for item in output if item["type"] != "function_call" or item["status"] == "completed"]
