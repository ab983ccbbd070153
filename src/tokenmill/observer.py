"""What the outside sees of an engine: everything that happens, for metrics, and its health."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from tokenmill.types import EngineStats, FinishReason, RequestStats, SamplingParams

__all__ = ["LOADING", "NO_OBSERVER", "Health", "Observer"]

LOADING = frozenset({"tokenizer", "weights", "memory"})
"""Phases of `Health` before the model is there for the first time."""


class Observer(Protocol):
    """Hears what happens, for metrics. Called in the event loop: must return at once."""

    def step(self, stats: EngineStats) -> None:
        """The engine finished a step."""

    def tokens(self, request_id: str, count: int, since_last_s: float | None) -> None:
        """`count` tokens came, so many seconds after the ones before; None for the first of a completion."""

    def finished(self, stats: RequestStats, reason: FinishReason, params: SamplingParams) -> None:
        """A completion ended."""


class _Silent:
    def step(self, stats: EngineStats) -> None:
        pass

    def tokens(self, request_id: str, count: int, since_last_s: float | None) -> None:
        pass

    def finished(self, stats: RequestStats, reason: FinishReason, params: SamplingParams) -> None:
        pass


NO_OBSERVER: Observer = _Silent()


@dataclasses.dataclass(frozen=True)
class Health:
    """Whether the engine serves, and if not, why."""

    ok: bool
    reason: str
    last_progress_age_s: float
    running: int
    waiting: int
    phase: str = "ready"
    """Of its life: tokenizer, weights, memory, ready, restarting or closed."""
    percent: float = 100.0
    """Of the weights that are loaded."""
    hung: bool = False
    full: bool = False
    """As many requests wait as may."""
    restarts: int = 0
