"""One call of `LLM` or `AsyncLLM`: its engine requests, and the output put together from what they bring."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from tokenmill.observer import Observer
from tokenmill.text.stream import TextStream
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.types import (
    CompletionOutput,
    EngineOutput,
    EngineRequest,
    FinishReason,
    PoolingParams,
    RequestOutput,
    SamplingParams,
)

__all__ = ["Call", "Mailbox"]


class _Completion:
    """One completion of a call while it grows."""

    def __init__(self, index: int, stream: TextStream) -> None:
        self.output = CompletionOutput(index=index, text="", token_ids=[])
        self.stream = stream
        self.stop: str | None = None
        self.last_token_at: float | None = None


class Call:
    """One call: its engine requests, and the output put together from what they bring.

    Args:
        delta: whether each output holds only what is new.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        delta: bool,
        pooling: PoolingParams | None = None,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self._pooling = pooling
        self._delta = delta
        self.output = RequestOutput(
            request_id=request_id, prompt=prompt, prompt_token_ids=token_ids, outputs=[], finished=False
        )
        ids = [request_id] if params.n == 1 else [f"{request_id}/{index}" for index in range(params.n)]
        self._open: dict[str, _Completion] = {}
        for index, child in enumerate(ids):
            stream = TextStream(
                tokenizer,
                token_ids,
                params.stop or (),
                params.include_stop_str_in_output,
                params.skip_special_tokens,
                params.min_tokens,
            )
            self._open[child] = _Completion(index, stream)
        self.output.outputs = [completion.output for completion in self._open.values()]

    @property
    def ids(self) -> list[str]:
        """Engine requests that are not ended."""
        return list(self._open)

    def requests(self, arrival: float, **fields: Any) -> list[EngineRequest]:
        """The engine requests of this call: completions after the first share the first one's prompt blocks."""
        requests = []
        first = self.ids[0]
        for index, request_id in enumerate(self.ids):
            params = self.params
            if index:
                seed = None if params.seed is None else params.seed + index
                params = msgspec.structs.replace(params, seed=seed, prompt_logprobs=None)
            requests.append(
                EngineRequest(
                    request_id=request_id,
                    prompt_token_ids=self.output.prompt_token_ids,
                    params=params,
                    arrival=arrival,
                    parent=first if index else "",
                    pooling=self._pooling,
                    **fields,
                )
            )
        return requests

    def take(self, came: EngineOutput, now: float, observer: Observer) -> tuple[CompletionOutput | None, bool]:
        """Adds what came to one completion.

        Returns:
            What is new to the caller, for `emit`, None if nothing is, and whether the engine request must be aborted
            because a stop string ended its text.
        """
        completion = self._open[came.request_id]
        output = completion.output
        if came.token_ids:
            since = None if completion.last_token_at is None else now - completion.last_token_at
            completion.last_token_at = now
            observer.tokens(self.request_id, len(came.token_ids), since)
        self.output.cached_tokens = max(self.output.cached_tokens, came.cached_tokens)
        if came.prompt_logprobs is not None:
            self.output.prompt_logprobs = came.prompt_logprobs
        if came.embedding:
            self.output.embedding = array("f", came.embedding)
        new = CompletionOutput(index=output.index, text="", token_ids=[])
        abort = False
        if completion.stop is None:
            piece = completion.stream.push(came.token_ids, came.finish_reason is not None)
            new.text, new.token_ids = piece.text, came.token_ids[: piece.tokens]
            if came.logprobs is not None:
                new.logprobs = came.logprobs[: piece.tokens]
            completion.stop = piece.stop
            abort = piece.stop is not None and came.finish_reason is None
        if came.finish_reason is not None:
            self._finish(completion, came, new, observer)
        output.text += new.text
        output.token_ids += new.token_ids
        if new.logprobs is not None:
            output.logprobs = output.logprobs or []
            output.logprobs += new.logprobs
        nothing = not new.token_ids and not new.text and new.finish_reason is None
        return (None if nothing else new), abort

    def _finish(self, completion: _Completion, came: EngineOutput, new: CompletionOutput, observer: Observer) -> None:
        output = completion.output
        reason = came.finish_reason
        if completion.stop is not None:
            reason = FinishReason.STOP  # the text had ended; the abort was ours
        output.finish_reason = new.finish_reason = reason
        output.stop_reason = new.stop_reason = came.stop_token if completion.stop is None else completion.stop
        output.error = new.error = came.error
        del self._open[came.request_id]
        self.output.finished = not self._open
        if came.stats is not None and reason is not None:
            self.output.stats.append(came.stats)
            observer.finished(came.stats, reason, self.params)

    def emit(self, new: list[CompletionOutput]) -> RequestOutput:
        """What the caller sees: only the new pieces, or a copy of everything so far."""
        if self._delta:
            return msgspec.structs.replace(self.output, outputs=new, stats=list(self.output.stats))
        outputs = [
            msgspec.structs.replace(
                output, token_ids=list(output.token_ids), logprobs=output.logprobs and list(output.logprobs)
            )
            for output in self.output.outputs
        ]
        return msgspec.structs.replace(self.output, outputs=outputs, stats=list(self.output.stats))


class Mailbox:
    """What a call has for its caller. Pieces that come faster than they are fetched become one: it cannot grow."""

    def __init__(self, call: Call) -> None:
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
