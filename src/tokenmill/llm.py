"""`LLM` and `AsyncLLM`: text in, text out. The one place where text and engine meet.

`LLM` runs the engine in this process and blocks; `AsyncLLM` runs it in a process of its own and streams. Both spread
the `n` completions of a call over engine requests and put the pieces together again through the same `Call`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec

from tokenmill.calls import Call, Mailbox
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.crash import NO_REPORTS, Reports
from tokenmill.engine.engine import Engine
from tokenmill.engine.events import Event
from tokenmill.engine.executor import LocalExecutor, Progress
from tokenmill.engine.grammar import Grammars
from tokenmill.engine.messages import Refused, Step
from tokenmill.errors import EngineError, RequestError, UnavailableError
from tokenmill.models.config import ModelConfig
from tokenmill.models.folder import read_pooling, resolve
from tokenmill.observer import NO_OBSERVER, Health, Observer
from tokenmill.prompt import Prompt, as_prompts, text_and_ids, with_bad_words
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.types import (
    CompletionOutput,
    EngineStats,
    PoolingParams,
    RequestOutput,
    SamplingParams,
)

__all__ = ["LLM", "NO_OBSERVER", "AsyncLLM", "Health", "Observer", "Prompt"]


Conversation = Sequence[Mapping[str, Any]]
"""Messages with `role` and `content`."""


_NO_TOKENS = SamplingParams(max_tokens=None)


def _pooling_of(config: ModelConfig) -> PoolingParams:
    """How a model's embeddings are made when a call says nothing."""
    if config.pooling != "auto":
        return PoolingParams(pooling=config.pooling)
    return read_pooling(resolve(config.model))


class LLM:
    """A model in this process.

    Args:
        model: "demo" for the built-in model, a folder in Hugging Face layout, or a hub id.
        config: all options of the engine; `model` then only overrides its model.
        progress: told (bytes done, bytes in all) while the weights load.

    Raises:
        ModelError, ConfigError: the model cannot be loaded or does not fit.
    """

    def __init__(
        self, model: str | None = None, *, config: EngineConfig | None = None, progress: Progress | None = None
    ) -> None:
        config = config or EngineConfig()
        if model is not None:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, model=model))
        self.config = config
        self.tokenizer = Tokenizer.load(resolve(config.model.model))
        executor = LocalExecutor(config, progress)
        self.engine = Engine(config, executor)
        self._grammars = executor.grammars
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all at once, and returns their outputs in order.

        Args:
            prompts: one prompt or many.
            sampling_params: one for all, or one per prompt.

        Raises:
            RequestError: a prompt or parameter cannot be served; nothing has been generated then.
        """
        many = as_prompts(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(many)
        else:
            params = list(sampling_params)
        if len(params) != len(many):
            raise RequestError(
                "invalid_parameter", f"{len(many)} prompts need as many sampling_params, not {len(params)}.",
                "sampling_params",
            )  # fmt: skip
        calls = [self._call(prompt, one) for prompt, one in zip(many, params, strict=True)]
        for _ in self._run(calls):
            pass  # the calls gather what comes
        return [call.output for call in calls]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or many, through the model's chat template."""
        from tokenmill.text.chat import encode_chat  # and with it jinja2, which only this needs

        one = not messages or isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Conversation], [messages] if one else messages)
        prompts = [
            encode_chat(
                self.tokenizer, conversation, tools, add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]  # fmt: skip
        return self.generate(prompts, sampling_params)

    @functools.cached_property
    def pooling(self) -> PoolingParams:
        """How the model's embeddings are made: as the option `pooling` or its sentence-transformers files say."""
        return _pooling_of(self.config.model)

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: PoolingParams | None = None) -> list[RequestOutput]:
        """Embeds prompts, all at once, and returns their outputs, which have an `embedding`, in order.

        Args:
            pooling: `LLM.pooling` unless given.

        Raises:
            RequestError: a prompt or parameter cannot be served.
            ModelError: the model's files ask for a pooling that does not exist here.
        """
        pooling = pooling or self.pooling
        calls = [self._call(prompt, _NO_TOKENS, pooling) for prompt in as_prompts(prompts)]
        for _ in self._run(calls):
            pass
        return [call.output for call in calls]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Completes one prompt and yields each piece as it comes. Closing the iterator aborts the request."""
        for call, new in self._run([self._call(prompt, sampling_params or SamplingParams())]):
            yield call.emit([new])

    def _call(self, prompt: Prompt, params: SamplingParams, pooling: PoolingParams | None = None) -> Call:
        text, ids = text_and_ids(self.tokenizer, prompt)
        params = with_bad_words(self.tokenizer, params)
        if params.structured is not None:
            self._grammars.compile(params.structured).result()  # refused here rather than in the engine
        return Call(str(next(self._numbers)), text, ids, params, self.tokenizer, delta=True, pooling=pooling)

    def _run(self, calls: list[Call]) -> Iterator[tuple[Call, CompletionOutput]]:
        """Serves calls to their end and yields what is new to each. Whatever stops it, no request is left behind."""
        owner = {child: call for call in calls for child in call.ids}
        try:
            for call in calls:
                for request in call.requests(time.monotonic()):
                    self.engine.add(request)
            while not all(call.output.finished for call in calls):
                outputs = self.engine.step()
                while outputs:
                    aborted: list[str] = []
                    now = time.monotonic()
                    for came in outputs:
                        call = owner[came.request_id]
                        new, abort = call.take(came, now, NO_OBSERVER)
                        if abort:
                            aborted.append(came.request_id)
                        if new is not None:
                            yield call, new
                    outputs = self.engine.abort(aborted)
        finally:
            self.engine.abort([child for call in calls for child in call.ids])


class AsyncLLM:
    """A model in a process of its own; belongs to one event loop. `start` makes one that serves; one that is made by
    hand loads nothing before `load`, and can be asked for its `health` meanwhile.

    Args:
        reports: where crashes of the engine are written down.
    """

    tokenizer: Tokenizer
    """There once the model is loaded."""

    def __init__(self, config: EngineConfig, observer: Observer = NO_OBSERVER, reports: Reports = NO_REPORTS) -> None:
        from tokenmill.engine.supervisor import Supervisor  # and with it zmq, which only this needs

        self.config = config
        self._observer = observer
        self._grammars = Grammars(config)
        self._engine = Supervisor(config, self._on_report, self._on_death, reports)
        self._calls: dict[str, Mailbox] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def start(
        cls, config: EngineConfig, observer: Observer = NO_OBSERVER, reports: Reports = NO_REPORTS
    ) -> AsyncLLM:
        """Starts the engine process and waits until the model is loaded.

        Raises:
            ModelError, ConfigError, EngineError: whatever kept the engine from starting.
        """
        llm = cls(config, observer, reports)
        await llm.load()
        return llm

    async def load(self) -> None:
        """Reads the tokenizer, starts the engine process and waits until the model is loaded.

        Raises:
            ModelError, ConfigError, EngineError: whatever kept the engine from starting.
        """
        self.tokenizer = await asyncio.to_thread(lambda: Tokenizer.load(resolve(self.config.model.model)))
        await self._engine.start()

    @property
    def model_name(self) -> str:
        """The model as the user named it."""
        return self.config.model.model

    @property
    def stats(self) -> EngineStats:
        """The engine's state after its latest step."""
        return self._engine.stats

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output, in tokens."""
        return self.stats.max_model_len

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
        deadline: float | None = None,
        delta: bool = False,
        pooling: PoolingParams | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Completes a prompt and yields the output as it grows. Closing the iterator aborts the request.

        What comes while the caller is busy is one output for it: a slow caller sees fewer, larger ones.

        Args:
            delta: yield only what is new each time, instead of everything so far.
            deadline: when the answer must be complete, on the monotonic clock; then it ends with the error
                ``deadline_exceeded``.
            pooling: set to get the embedding of the prompt instead of tokens; see `embed`.

        Raises:
            RequestError: the request cannot be served.
            UnavailableError: ``starting``, ``engine_restarting``, ``queue_full`` or ``shutting_down``.
            EngineError: the engine process died.
        """
        arrival = time.monotonic()
        self.check()
        if params.structured is not None:
            # Refused here, on a thread, so that the engine meets none that it must refuse.
            await asyncio.shield(asyncio.wrap_future(self._grammars.compile(params.structured)))
        text, ids = text_and_ids(self.tokenizer, prompt)
        name = request_id or f"request-{next(self._numbers)}"
        params = with_bad_words(self.tokenizer, params)
        call = Call(name, text, ids, params, self.tokenizer, delta, pooling)
        if taken := [child for child in call.ids if child in self._calls]:
            raise RequestError(
                "duplicate_request_id", f"A request {taken[0]!r} is under way; use another id.", "request_id"
            )
        mailbox = Mailbox(call)
        self._calls.update(dict.fromkeys(call.ids, mailbox))
        self._idle.clear()
        try:
            for request in call.requests(
                arrival, priority=priority, tenant=tenant, cache_salt=cache_salt, deadline=deadline
            ):
                await self._engine.add(request)
            async for output in mailbox.outputs():
                yield output
        finally:
            if not call.output.finished:
                self._abandon(call)

    @functools.cached_property
    def pooling(self) -> PoolingParams:
        """How the model's embeddings are made: as the option `pooling` or its sentence-transformers files say."""
        return _pooling_of(self.config.model)

    async def embed(self, prompt: Prompt, pooling: PoolingParams | None = None, **fields: Any) -> RequestOutput:
        """Embeds one prompt and returns the output, which has an `embedding`.

        Args:
            pooling: `AsyncLLM.pooling` unless given.
            fields: keyword arguments of `generate`, which raises the errors.
        """
        outputs = self.generate(prompt, _NO_TOKENS, pooling=pooling or self.pooling, **fields)
        return [output async for output in outputs][-1]

    def check(self) -> None:
        """Says whether requests are taken now.

        Raises:
            UnavailableError: ``starting``, ``engine_restarting`` or ``shutting_down``.
        """
        if self._draining:
            raise UnavailableError("shutting_down", "The server is shutting down; send the request to another.")
        self._engine.check()

    def _abandon(self, call: Call) -> None:
        """Aborts what is left of a call. The engine's answer still closes its books in `_on_report`."""
        known = [child for child in call.ids if child in self._calls]
        if known and self._engine.phase == "ready":
            self._spawn(known)
        else:
            self._forget(call.ids)

    def _spawn(self, request_ids: list[str]) -> None:
        async def abort() -> None:
            with contextlib.suppress(EngineError, UnavailableError):
                await self._engine.abort(request_ids)

        task = asyncio.ensure_future(abort())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _forget(self, request_ids: list[str]) -> None:
        for child in request_ids:
            self._calls.pop(child, None)
        if not self._calls:
            self._idle.set()

    def _on_report(self, report: Step | Refused) -> None:
        if isinstance(report, Refused):
            mailbox = self._calls.get(report.request_id)
            self._forget([report.request_id])
            if mailbox is not None:
                mailbox.fail(report.reason())
            return
        aborted = []
        now = time.monotonic()
        for came in report.outputs:
            mailbox = self._calls.get(came.request_id)
            if mailbox is None:
                continue
            new, abort = mailbox.call.take(came, now, self._observer)
            if abort:
                aborted.append(came.request_id)
            if new is not None:
                mailbox.put(new)
            if came.finish_reason is not None:
                self._forget([came.request_id])
        if aborted:
            self._spawn(aborted)
        for tokens, seconds in report.steps:
            self._observer.step(msgspec.structs.replace(report.stats, step_tokens=tokens, step_seconds=seconds))

    def _on_death(self, error: Exception) -> None:
        for mailbox in self._calls.values():
            mailbox.fail(error)
        self._forget(list(self._calls))

    async def abort(self, request_id: str) -> None:
        """Ends a request with reason `abort`. Unknown or ended ones are ignored."""
        children = [child for child in self._calls if child == request_id or child.startswith(request_id + "/")]
        if children:
            await self._engine.abort(children)

    async def events(self, request_id: str = "") -> list[Event]:
        """The engine's decisions about one request, or all that are kept."""
        return await self._engine.events(request_id)

    def health(self) -> Health:
        """Whether the engine is there and its steps advance."""
        engine, stats = self._engine, self.stats
        hung = 0 < self.config.hang_timeout_s < engine.stalled_s
        reason = engine.reason or (f"No step has ended for {engine.stalled_s:.0f} s." if hung else "")
        return Health(
            ok=engine.phase == "ready" and not hung,
            reason=reason,
            last_progress_age_s=time.monotonic() - stats.last_progress,
            running=stats.running,
            waiting=stats.waiting,
            phase=engine.phase,
            percent=engine.percent,
            hung=hung,
            full=stats.waiting >= self.config.scheduler.max_waiting,
            restarts=engine.restarts,
        )

    def refuse(self) -> None:
        """Takes no new requests from now on: they fail with ``shutting_down``."""
        self._draining = True

    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests, waits for those under way, and aborts what is left after `timeout_s` seconds."""
        self.refuse()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            with contextlib.suppress(EngineError, UnavailableError, TimeoutError):
                await self._engine.abort(list(self._calls))
                await asyncio.wait_for(self._idle.wait(), 1.0)

    async def close(self) -> None:
        """Ends the engine process. Requests still under way fail with ``shutting_down``."""
        self.refuse()
        self._on_death(UnavailableError("shutting_down", "The server is shutting down."))
        await self._engine.close()
