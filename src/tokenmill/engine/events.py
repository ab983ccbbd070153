"""The engine's decisions, as they were taken.

Every decision of the scheduler and the cache is one `Event`. Metrics, traces, explanations and recordings read this one
schema; nothing else describes what the engine did. The ring is bounded and cheap enough to be always on.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Literal

import msgspec

__all__ = ["Action", "Event", "EventLog"]

Action = Literal[
    "arrive",  # a request was accepted into the queue
    "refuse",  # a request was turned away; reason is the error code
    "admit",  # it left the queue; tokens = prompt tokens still to compute
    "defer",  # it stays in the queue; reason says why; recorded when the reason changes
    "hit",  # tokens found in the prefix cache, blocks shared
    "miss",  # tokens not found there; reason says why
    "fork",  # it shares the blocks of its parent
    "chunk",  # tokens computed for it in one step
    "copy",  # shared blocks it was about to write were copied
    "preempt",  # its blocks were taken back; reason says for whom
    "resume",  # it was admitted again after a preemption; tokens = tokens to recompute
    "evict",  # cached content was dropped from the pool; reason is the eviction policy
    "finish",  # it ended; reason is the finish reason; tokens = generated tokens
]


class Event(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One decision. `request_id` is empty for decisions about the cache itself."""

    time: float
    step: int
    request_id: str
    action: Action
    reason: str = ""
    tokens: int = 0
    blocks: int = 0


class EventLog:
    """A bounded ring of the latest events. `capacity` 0 keeps none."""

    def __init__(self, capacity: int) -> None:
        self._ring: deque[Event] = deque(maxlen=capacity)
        self.step = 0
        """Number of the current step; the engine advances it."""
        self.total = 0
        """Events ever added."""

    def add(
        self, time: float, request_id: str, action: Action, reason: str = "", tokens: int = 0, blocks: int = 0
    ) -> None:
        self._ring.append(Event(time, self.step, request_id, action, reason, tokens, blocks))
        self.total += 1

    def __iter__(self) -> Iterator[Event]:
        return iter(tuple(self._ring))

    def __len__(self) -> int:
        return len(self._ring)

    def of(self, request_id: str) -> list[Event]:
        """What is still known about one request, oldest first."""
        return [event for event in self._ring if event.request_id == request_id]

    def since(self, total: int) -> list[Event]:
        """Those added after the first `total`, as far as they are kept, oldest first."""
        count = min(self.total - total, len(self._ring))
        return list(itertools.islice(reversed(self._ring), count))[::-1]
