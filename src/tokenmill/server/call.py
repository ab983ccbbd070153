"""One prompt that a client wants completed, from its admission to its end, and those who watch over it.

Limits, the usage ledger, traces and explanations are interceptors: each sees every call begin and end, whichever
endpoint it came through, and none of them knows the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from starlette.requests import Request

from tokenmill.llm import Prompt
from tokenmill.server.principal import ANYONE, Principal, principal_of
from tokenmill.types import JSON, PoolingParams, RequestOutput, RequestStats, SamplingParams

__all__ = ["Asked", "Call", "Interceptor", "Outcome", "Tally", "call_of"]


@dataclasses.dataclass(kw_only=True)
class Call:
    """What one generation is asked for, and by whom."""

    request_id: str
    """The engine's own id; the completions of `n` > 1 add ``/0``, ``/1``."""
    endpoint: str
    """Path of the endpoint, as ``/v1/chat/completions``."""
    model: str
    """The name that the client asked for."""
    prompt: Prompt
    params: SamplingParams
    pooling: PoolingParams | None = None
    """Set when the embedding of the prompt is wanted and no completion."""
    principal: Principal = ANYONE
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    timeout_s: float | None = None
    """When the answer is of no more use, in seconds from now."""
    delta: bool = False
    """Whether each output holds only what is new."""
    trace: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """``traceparent`` and ``tracestate`` of the HTTP request."""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    """Headers that go out with the answer; interceptors add theirs before it begins."""
    context: JSON = dataclasses.field(default_factory=dict)
    """What the endpoint knows besides: ``messages``, ``tools`` and ``variables`` of a conversation, the name that the
    client gave it as ``conversation``, ``metadata``."""
    report: JSON = dataclasses.field(default_factory=dict)
    """What interceptors have to tell the client, should it ask."""
    prompt_token_ids: list[int] = dataclasses.field(default_factory=list)
    """Filled before the interceptors begin."""


class Asked(Protocol):
    """What every body that asks for a generation says about how it is to be served."""

    @property
    def priority(self) -> int: ...
    @property
    def user(self) -> str | None: ...
    @property
    def cache_salt(self) -> str: ...
    @property
    def timeout_s(self) -> float | None: ...
    @property
    def stream(self) -> bool | None: ...


def call_of(
    request: Request,
    body: Asked,
    model: str,
    request_id: str,
    prompt: Prompt,
    params: SamplingParams,
    context: JSON | None = None,
    pooling: PoolingParams | None = None,
) -> Call:
    """A call for one prompt of an HTTP request."""
    traced = {name: value for name in ("traceparent", "tracestate") if (value := request.headers.get(name))}
    return Call(
        request_id=request_id,
        endpoint=request.scope["route"].path,
        model=model,
        prompt=prompt,
        params=params,
        pooling=pooling,
        principal=principal_of(request),
        priority=body.priority,
        tenant=body.user or "",
        cache_salt=body.cache_salt,
        timeout_s=body.timeout_s,
        delta=bool(body.stream),
        trace=traced,
        headers=request.state.headers,
        context=context or {},
    )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    finish_reasons: tuple[str, ...]
    """One per completion that ended: stop, length, abort or error."""
    error_code: str
    """Why it was refused or failed; empty when it was served."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    stats: tuple[RequestStats, ...]
    """One per completion that the engine finished."""
    seconds: float
    """From arrival to the end."""


class Interceptor(Protocol):
    """Watches over calls."""

    async def begin(self, call: Call) -> None:
        """Before the engine sees the call. May change it; raising a `TokenmillError` refuses it."""

    def end(self, call: Call, outcome: Outcome) -> None:
        """Exactly once for every call whose `begin` was entered, also when it raised. Must return at once."""


class Tally:
    """Adds up the outputs of a call to its outcome."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._last: RequestOutput | None = None
        self._generated = 0
        self._reasons: list[str] = []
        self.error_code = ""

    def add(self, output: RequestOutput) -> None:
        """Counts an output, whether it is an increment or everything so far."""
        self._last = output
        tokens = sum(len(completion.token_ids) for completion in output.outputs)
        if self._call.delta:
            self._generated += tokens
        else:
            self._generated = tokens
            self._reasons.clear()
        for completion in output.outputs:
            if completion.finish_reason is not None:
                self._reasons.append(completion.finish_reason)
            if completion.error is not None:
                self.error_code = completion.error.code

    def outcome(self, seconds: float) -> Outcome:
        """How the call ended, as of now; completions that never ended count as aborted."""
        last = self._last
        open_ends = self._call.params.n - len(self._reasons)
        return Outcome(
            finish_reasons=(*self._reasons, *["abort"] * open_ends),
            error_code=self.error_code,
            prompt_tokens=len(self._call.prompt_token_ids),
            cached_tokens=last.cached_tokens if last is not None else 0,
            completion_tokens=self._generated,
            stats=tuple(last.stats) if last is not None else (),
            seconds=seconds,
        )
