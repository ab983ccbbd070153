"""What every route works with: the parts of the server, and the one way from a route to the engine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncGenerator
from typing import cast

from starlette.requests import Request

from tokenmill.errors import RequestError, TokenmillError
from tokenmill.llm import AsyncLLM
from tokenmill.prompt import tokenize
from tokenmill.server.aside import aside
from tokenmill.server.call import Call, Interceptor, Tally
from tokenmill.server.filter import FilterChain
from tokenmill.server.observability.metrics import Metrics
from tokenmill.text.dialect import Chain, choose
from tokenmill.types import RequestOutput

__all__ = ["Service", "service_of"]


@dataclasses.dataclass(frozen=True)
class Service:
    """The parts that the app was built from."""

    llm: AsyncLLM
    metrics: Metrics
    names: tuple[str, ...]
    """Names of the model in the API; the first one is its own."""
    created: int
    """When the server started, in seconds since 1970."""
    fingerprint: str = ""
    """Changes when the same request with the same seed may be answered otherwise: OpenAI's ``system_fingerprint``."""
    parsers: tuple[str, str] = ("auto", "auto")
    """Names of the dialects of tool calls and of thoughts."""
    interceptors: tuple[Interceptor, ...] = ()
    filters: FilterChain = dataclasses.field(default_factory=FilterChain)
    """What is kept out of prompts and answers."""

    @property
    def model_name(self) -> str:
        """The model's own name in the API."""
        return self.names[0]

    @functools.cached_property
    def dialects(self) -> Chain:
        """How the model writes thoughts and tool calls."""
        return choose(self.llm.tokenizer.chat_template, *self.parsers)

    def check_model(self, name: str | None) -> str:
        """The name to answer under. No name means the one there is.

        Raises:
            RequestError: ``model_not_found``.
        """
        if name is None:
            return self.model_name
        if name not in self.names:
            here = " or ".join(map(repr, self.names))
            raise RequestError("model_not_found", f"There is no model {name!r}; this server has {here}.", "model")
        return name

    async def generate(self, call: Call) -> AsyncGenerator[RequestOutput, None]:
        """Completes the prompt of `call` and yields its outputs. Closing the generator aborts the request.

        Raises:
            TokenmillError: from an interceptor that refuses the call, or from the engine.
        """
        arrival = time.monotonic()
        call.prompt_token_ids = await self._tokens(call)
        tally = Tally(call)
        entered: list[Interceptor] = []
        try:
            self.filters.check(call.params)
            for interceptor in self.interceptors:
                entered.append(interceptor)
                await interceptor.begin(call)
            outputs = cast(
                AsyncGenerator[RequestOutput, None],
                self.llm.generate(
                    call.prompt_token_ids,
                    call.params,
                    request_id=call.request_id,
                    priority=call.principal.priority + call.priority,
                    tenant=call.principal.key_id or call.tenant,
                    cache_salt=call.principal.salt + call.cache_salt,
                    deadline=None if call.timeout_s is None else arrival + call.timeout_s,
                    delta=call.delta,
                    pooling=call.pooling,
                ),
            )
            async with contextlib.aclosing(outputs):
                async for output in self.filters.answer(outputs, call.params.n, call.delta):
                    tally.add(output)
                    yield output
        except TokenmillError as error:
            tally.error_code = error.code
            raise
        except Exception:
            tally.error_code = "internal_error"
            raise
        finally:
            outcome = tally.outcome(time.monotonic() - arrival)
            for interceptor in reversed(entered):
                interceptor.end(call, outcome)

    async def _tokens(self, call: Call) -> list[int]:
        length = len(call.prompt) if isinstance(call.prompt, str) else 0
        return await aside(length, lambda: tokenize(self.llm.tokenizer, call.prompt))


def service_of(request: Request) -> Service:
    """The service of the app that took `request`."""
    return cast(Service, request.app.state.service)
