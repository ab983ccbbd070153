"""How an answer is produced and sent: several generations as one, streams of events, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenmill.errors import EngineError, RequestError, TokenmillError
from tokenmill.server.errors import body_of, internal_error
from tokenmill.server.schemas.request import StreamOptions
from tokenmill.server.sse import DONE, event
from tokenmill.types import JSON, CompletionOutput, FinishReason, RequestOutput

__all__ = ["EventStream", "Usage", "check_output", "last_outputs", "merge", "until_disconnect"]

T = TypeVar("T")
_logger = logging.getLogger(__name__)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Does `work`, but cancels it when the client goes away.

    Args:
        receive: the ASGI channel of the request, whose body has been read.

    Raises:
        RequestError: ``client_gone``; nobody is left to read an answer.
    """
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise RequestError("client_gone", "The client closed the connection.")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of all streams as they come, each with the number of its stream. Closing it closes all streams.

    The first exception of a stream ends everything.
    """
    if len(streams) == 1:  # the common case needs no tasks
        async with contextlib.aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    queue.put_nowait((number, item))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            came = await queue.get()
            if came is None:
                running -= 1
            elif isinstance(came, BaseException):
                raise came
            else:
                yield came
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def last_outputs(streams: Sequence[AsyncGenerator[RequestOutput, None]]) -> list[RequestOutput]:
    """Runs generations to their end; returns the complete outputs in the order of `streams`.

    Raises:
        EngineError: when the engine failed on one of them.
        TokenmillError: whatever a generation raises.
    """
    async with contextlib.aclosing(merge(streams)) as merged:
        last = {number: output async for number, output in merged}
    for output in last.values():
        for completion in output.outputs:
            check_output(completion)
    return [last[number] for number in range(len(streams))]


def check_output(completion: CompletionOutput) -> None:
    """Raises what ended a completion, if it was an error.

    Raises:
        EngineError: with the code that the engine gave.
    """
    if completion.finish_reason is FinishReason.ERROR:
        if completion.error is None:
            raise EngineError("engine_failed", "The engine failed while it served the request.")
        raise EngineError(completion.error.code, completion.error.message, completion.error.field)


class Usage:
    """Counts the tokens of an answer, whose outputs come complete or as increments."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._completion_tokens = 0
        self._reasoning_tokens = 0

    def add(self, prompt: int, output: RequestOutput, generated: bool = True) -> None:
        """Counts one output.

        Args:
            prompt: number of the prompt in the HTTP request.
            generated: whether what was generated is part of the answer.
        """
        self._prompts[prompt] = (len(output.prompt_token_ids), output.cached_tokens)
        if generated:
            self._completion_tokens += sum(len(completion.token_ids) for completion in output.outputs)

    def reasoning(self, tokens: int) -> None:
        """Counts tokens, already counted as generated, that are no part of the answer proper."""
        self._reasoning_tokens += tokens

    def to_json(self) -> JSON:
        """OpenAI's ``usage``."""
        prompt_tokens = sum(tokens for tokens, _ in self._prompts.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
            "completion_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
        }

    def of_chunk(self, options: StreamOptions) -> JSON:
        """The ``usage`` field of a chunk with choices, if it has one."""
        if options.continuous_usage_stats:
            return {"usage": self.to_json()}
        return {"usage": None} if options.include_usage else {}


def openai_failure(error: TokenmillError) -> bytes:
    """The event that ends a stream of OpenAI's which failed."""
    return event(body_of(error))


class EventStream(Response):
    """Sends events while they are made. When the client goes away, the generator is closed.

    Use `begin` to make one: an error before the first event is then an ordinary error answer, with its own status.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        request_id: str,
        end: bytes = DONE,
        failure: Callable[[TokenmillError], bytes] = openai_failure,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._request_id = request_id
        self._end = end
        self._failure = failure

    @classmethod
    async def begin(
        cls,
        request: Request,
        events: AsyncGenerator[bytes, None],
        end: bytes = DONE,
        failure: Callable[[TokenmillError], bytes] = openai_failure,
    ) -> EventStream:
        """Waits for the first event.

        Args:
            end: sent when all events were.
            failure: the events that tell of an error in mid-stream; nothing follows them.

        Raises:
            TokenmillError: whatever `events` raises before its first one.
        """
        first = await until_disconnect(request.receive, anext(events))
        return cls(first, events, request.state.request_id, end, failure)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._rest):
            try:
                await until_disconnect(receive, self._send(send))
            except RequestError as error:
                if error.code != "client_gone":
                    raise

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for data in self._rest:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            end = self._end
        except TokenmillError as error:
            end = self._failure(error)
        except Exception:
            _logger.exception("request %s failed in mid-stream", self._request_id)
            end = self._failure(internal_error(self._request_id))
        await send({"type": "http.response.body", "body": end})
