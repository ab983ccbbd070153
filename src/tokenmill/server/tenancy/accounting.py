"""Keeps account of every call: its limits before, its tokens and cost after, and a line in the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenmill.errors import RequestError
from tokenmill.server.call import Call, Outcome
from tokenmill.server.tenancy.costs import MachineTime, Prices
from tokenmill.server.tenancy.ledger import Entry, Recorder
from tokenmill.server.tenancy.limits import RateLimits
from tokenmill.server.tenancy.quota import Ticket

__all__ = ["Accounting"]


class Accounting(Collector):
    """The interceptor that limits and charges calls. It is a collector of its own metrics too.

    Args:
        now: seconds since 1970.
    """

    def __init__(
        self,
        limits: RateLimits,
        ledger: Recorder,
        prices: Prices,
        machine: MachineTime,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._limits = limits
        self._ledger = ledger
        self._prices = prices
        self._machine = machine
        self._now = now
        self._open: dict[str, Ticket | None] = {}
        self._dollars = 0.0

    async def begin(self, call: Call) -> None:
        """Admits the call.

        Raises:
            RequestError: ``model_not_allowed``, or as `RateLimits.admit` says.
            UnavailableError: as `RateLimits.admit` says.
        """
        if not call.principal.may_use(call.model):
            raise RequestError("model_not_allowed", f"This key may not use the model {call.model!r}.", "model")
        self._open[call.request_id] = await self._limits.admit(call)
        self._machine.enter(call.request_id)

    def end(self, call: Call, outcome: Outcome) -> None:
        """Charges the call. One that was refused, here or by the engine, costs nothing and is not in the ledger."""
        if call.request_id not in self._open:
            return
        ticket = self._open.pop(call.request_id)
        machine_s = self._machine.leave(call.request_id)
        if outcome.error_code and not outcome.stats and not outcome.completion_tokens:
            if ticket is not None:
                self._limits.release(ticket)
            return
        dollars = self._prices.cost(outcome.prompt_tokens, outcome.completion_tokens, machine_s)
        self._dollars += dollars
        if ticket is not None:
            self._limits.settle(ticket, outcome.prompt_tokens + outcome.completion_tokens, dollars)
        self._ledger.record(_entry(call, outcome, dollars, self._now()))

    def collect(self) -> Iterator[Metric]:
        """The metrics of limits, cost and ledger."""
        yield CounterMetricFamily("tokenmill:cost_dollars", "Cost of the requests served.", self._dollars)
        refused = CounterMetricFamily(
            "tokenmill:rate_limited_requests", "Requests refused by a limit of their key.", labels=("limit",)
        )
        for name, count in sorted(self._limits.refused.items()):
            refused.add_metric((name,), count)
        yield refused
        yield GaugeMetricFamily(
            "tokenmill:ledger_pending_records", "Requests that are not in the database yet.", self._ledger.pending
        )
        yield CounterMetricFamily(
            "tokenmill:ledger_lost_records", "Requests that could not be written down.", self._ledger.lost
        )


def _entry(call: Call, outcome: Outcome, dollars: float, now: float) -> Entry:
    """The line of a call. Times are those of the completion that was first or last, as the client saw it."""
    stats = outcome.stats
    scheduled = [each.scheduled - each.arrival for each in stats if each.scheduled is not None]
    first = [each.first_token - each.arrival for each in stats if each.first_token is not None]
    return Entry(
        request_id=call.request_id,
        finished=now,
        key_id=call.principal.key_id,
        model=call.model,
        endpoint=call.endpoint,
        prompt_tokens=outcome.prompt_tokens,
        cached_tokens=outcome.cached_tokens,
        completion_tokens=outcome.completion_tokens,
        rejected_tokens=0,
        queue_s=min(scheduled, default=None),
        first_token_s=min(first, default=None),
        total_s=outcome.seconds,
        dollars=dollars,
        finish=",".join(dict.fromkeys(outcome.finish_reasons)),
        error_code=outcome.error_code,
    )
