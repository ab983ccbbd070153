"""Limits of a key: how many requests and tokens, how much at once, how much a day.

A request takes its prompt and all the tokens that it may generate, and gives back at its end what it did not need.
Answers carry OpenAI's headers.

Source: https://platform.openai.com/docs/guides/rate-limits
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable

from tokenmill.errors import RequestError, UnavailableError
from tokenmill.server.call import Call
from tokenmill.server.tenancy.costs import Prices
from tokenmill.server.tenancy.quota import Kind, Meter, Quotas, Reading, Ticket

__all__ = ["RateLimits", "duration"]

_CODES = {
    "requests": "rate_limit_exceeded",
    "tokens": "rate_limit_exceeded",
    "concurrency": "concurrency_exceeded",
    "tokens_per_day": "tokens_per_day_exceeded",
    "dollars_per_day": "dollars_per_day_exceeded",
}
"""The meters, and what a request is refused with that finds one without room."""

_IN_WORDS = {
    "requests": "requests per minute",
    "tokens": "tokens per minute",
    "concurrency": "requests at once",
    "tokens_per_day": "tokens per day",
    "dollars_per_day": "dollars per day",
}


class RateLimits:
    """Holds each key to its limits.

    Args:
        quotas: who counts.
        prices: what tokens cost, to know before a request what it may cost.
        max_model_len: tells the longest context, once the model is loaded: the most that a request can take which sets
            no `max_tokens`.
    """

    def __init__(self, quotas: Quotas, prices: Prices, max_model_len: Callable[[], int]) -> None:
        self._quotas = quotas
        self._prices = prices
        self._max_model_len = max_model_len
        self.refused: collections.Counter[str] = collections.Counter()
        """Requests refused, by the limit that refused them."""

    async def admit(self, call: Call) -> Ticket | None:
        """Takes what `call` may need; None for a key without limits. Sets the headers of the answer.

        Raises:
            UnavailableError: ``rate_limit_exceeded``, ``concurrency_exceeded``, ``tokens_per_day_exceeded``,
                ``dollars_per_day_exceeded``.
            RequestError: ``prompt_exceeds_limit`` when the prompt alone is more than the limit allows in a minute.
        """
        meters = self._meters(call)
        if not meters:
            return None
        verdict = await self._quotas.reserve(call.principal.key_id, call.request_id, meters)
        call.headers.update(_headers(meters, verdict.readings))
        if verdict.ticket is not None:
            return verdict.ticket
        meter, reading = max(zip(meters, verdict.readings, strict=True), key=lambda pair: pair[1].retry_s)
        call.headers["retry-after"] = str(max(1, math.ceil(reading.retry_s)))
        self.refused[meter.name] += 1
        raise UnavailableError(_CODES[meter.name], _message(meter, reading))

    def settle(self, ticket: Ticket, tokens: int, dollars: float) -> None:
        """Gives back what a call did not need."""
        self._quotas.settle(ticket, {"tokens": tokens, "tokens_per_day": tokens, "dollars_per_day": dollars})

    def release(self, ticket: Ticket) -> None:
        """Gives back everything but the request itself: the engine has refused it."""
        self.settle(ticket, 0, 0.0)

    def _meters(self, call: Call) -> list[Meter]:
        limits = call.principal.limits
        prompt = len(call.prompt_token_ids)
        longest = 0 if call.pooling is not None else max(0, self._max_model_len() - prompt)
        most = call.params.n * (longest if call.params.max_tokens is None else min(call.params.max_tokens, longest))
        found = []
        if limits.requests_per_minute is not None:
            found.append(Meter("requests", Kind.BUCKET, limits.requests_per_minute, 1))
        if (per_minute := limits.tokens_per_minute) is not None:
            if prompt > per_minute:
                raise RequestError(
                    "prompt_exceeds_limit",
                    f"The prompt has {prompt} tokens; this key may use {per_minute} per minute. Send a shorter one.",
                )
            # Who may generate more than a minute's worth waits for a full bucket, takes it all, and can leave a debt.
            found.append(Meter("tokens", Kind.BUCKET, per_minute, min(prompt + most, per_minute)))
        if limits.concurrency is not None:
            found.append(Meter("concurrency", Kind.LEASE, limits.concurrency, 1))
        if limits.tokens_per_day is not None:
            found.append(Meter("tokens_per_day", Kind.DAY, limits.tokens_per_day, prompt + most))
        if limits.dollars_per_day is not None:
            cost = self._prices.cost(prompt, most, 0.0)
            found.append(Meter("dollars_per_day", Kind.DAY, limits.dollars_per_day, cost))
        return found


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``6m0s``, ``1.5s``, ``20ms``, ``0s``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms" if seconds > 0 else "0s"
    minutes, rest = divmod(math.ceil(seconds * 1000) / 1000, 60)
    hours, minutes = divmod(int(minutes), 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{round(rest, 3):g}s"


def _headers(meters: list[Meter], readings: tuple[Reading, ...]) -> dict[str, str]:
    headers = {}
    for meter, reading in zip(meters, readings, strict=True):
        if meter.kind is Kind.BUCKET:
            headers[f"x-ratelimit-limit-{meter.name}"] = str(int(meter.limit))
            headers[f"x-ratelimit-remaining-{meter.name}"] = str(max(0, math.floor(reading.remaining + 1e-6)))
            headers[f"x-ratelimit-reset-{meter.name}"] = duration(reading.reset_s)
    return headers


def _message(meter: Meter, reading: Reading) -> str:
    limit = f"This key may use {meter.limit:g} {_IN_WORDS[meter.name]}"
    if meter.kind is Kind.LEASE:
        return f"{limit}, and so many are under way. Ask again when one has ended."
    if meter.kind is Kind.DAY and reading.remaining > 0:
        return (
            f"{limit}; {reading.remaining:g} are left today, and this request may take {meter.cost:g}. "
            "Ask for fewer with max_tokens, or ask again after midnight UTC."
        )
    return f"{limit}. Ask again in {duration(reading.retry_s)}."
