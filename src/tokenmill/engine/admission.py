"""A bounded queue before the engine: who may still join it, and when it is worth asking again.

`Engine.add` itself takes everything, for whoever has all work at hand (`LLM.generate`). A server does not: what waits
longer than anybody listens is work for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from tokenmill.engine.scheduler import Scheduler
from tokenmill.errors import UnavailableError
from tokenmill.types import Clock, EngineOutput, EngineRequest

__all__ = ["Admission", "retry_after"]

_LATEST = 64
"""Ends of requests by which the speed of the queue is judged."""

_SHORTEST_S = 1.0
_LONGEST_S = 60.0


class Admission:
    """Stands before an engine's queue.

    Args:
        limit: requests that may wait.
    """

    def __init__(self, scheduler: Scheduler, limit: int, clock: Clock) -> None:
        self._scheduler = scheduler
        self._limit = limit
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_LATEST)

    def check(self, request: EngineRequest) -> None:
        """Refuses a request when the queue is full. Further completions of a call that was let in always join.

        Raises:
            UnavailableError: ``queue_full``.
        """
        waiting = len(self._scheduler.waiting)
        if waiting < self._limit or request.parent in self._scheduler.requests:
            return
        now = self._clock()
        self._scheduler.events.add(now, request.request_id, "refuse", "queue_full", len(request.prompt_token_ids))
        raise UnavailableError(
            "queue_full",
            f"{waiting} requests wait already; ask again later.",
            retry_after_s=retry_after(waiting, self._ends, now),
        )

    def ended(self, outputs: Iterable[EngineOutput]) -> None:
        """Counts the requests that ended with a step."""
        now = self._clock()
        self._ends.extend(now for output in outputs if output.finish_reason is not None)


def retry_after(waiting: int, ends: deque[float], now: float) -> float:
    """Seconds until those that wait now are on their turn, if requests go on ending as fast as the last ones did.

    Each end lets one request out of the queue. `ends` are the times of the latest ends: n of them since the first makes
    n / (now - first) a second, which also falls while nothing ends. The queue has then turned over once: a client that
    comes back finds the places that are free by now, not the one that the next client takes. At least a second, so that
    nobody asks in a loop; at most a minute, because the estimate is worth no more.
    """
    if not ends or now <= ends[0]:
        return _SHORTEST_S
    return min(max(waiting * (now - ends[0]) / len(ends), _SHORTEST_S), _LONGEST_S)
