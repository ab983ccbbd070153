"""How the server goes: not ready, then no admission, then idle, then gone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import cast

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request

from tokenmill.llm import AsyncLLM

__all__ = ["Lifecycle", "lifecycle_of"]


class Lifecycle(Collector):
    """Asked to end the server by signals and by ``POST /admin/drain``. A collector of its own metrics.

    Attributes:
        draining: whether the end has begun: the server is not ready any more.
        stopping: set when admission stops.
        hurry: set when what still runs is not waited for.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._signalled = False
        self.draining = False
        self.stopping = asyncio.Event()
        self.hurry = asyncio.Event()

    def drain(self, delay_s: float = 0.0) -> None:
        """Begins the end, unless it has begun.

        Args:
            delay_s: how long requests are still taken, so that those who route them can see that the server is not
                ready before one is refused.
        """
        self.draining = True
        if delay_s > 0:
            asyncio.get_running_loop().call_later(delay_s, self._stop)
        else:
            self._stop()

    def _stop(self) -> None:
        self._llm.refuse()
        self.stopping.set()

    def signal(self) -> None:
        """The first one drains, also where a drain is under way with a delay; the second does not wait."""
        if self._signalled:
            self.hurry.set()
        self._signalled = True
        self.drain()

    def collect(self) -> Iterator[Metric]:
        """Whether it drains, and how often the engine came back."""
        yield GaugeMetricFamily("tokenmill:draining", "1 while no more requests are taken.", int(self.draining))
        yield CounterMetricFamily(
            "tokenmill:engine_restarts", "How often the engine was started again.", self._llm.health().restarts
        )


def lifecycle_of(request: Request) -> Lifecycle:
    """The lifecycle of the server that took `request`."""
    return cast(Lifecycle, request.app.state.lifecycle)
