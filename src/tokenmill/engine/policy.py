"""What a scheduling policy and a batching mode must answer. The mechanism, in `scheduler`, never names one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

from tokenmill.engine.config import SchedulerConfig
from tokenmill.engine.request import Request

__all__ = ["Batching", "PaddedBatching", "Policy", "View"]


class View(Protocol):
    """What a policy may look at."""

    @property
    def now(self) -> float:
        """The time of this step."""

    def cached_tokens(self, request: Request) -> int:
        """Tokens of a waiting request that the prefix cache holds."""

    def blocks_freed(self, request: Request) -> int:
        """Blocks that preempting a running request would make available."""


class Policy(ABC):
    """Decides by returning sort keys. One instance per engine; it may keep counters of its own."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config

    @abstractmethod
    def order(self, request: Request, view: View) -> Any:
        """Sort key of a waiting or running request; the lowest goes first. Keys of one policy must be comparable."""

    def victim(self, request: Request, view: View) -> Any:
        """Sort key of a running request when memory is short; the lowest is preempted.

        By default the one whose recomputation costs least per block it frees. The seconds to recompute are taken as
        proportional to its computed tokens: a constant factor does not change the order.
        """
        return request.computed / max(1, view.blocks_freed(request))

    def token_budget(self, limit: int) -> int:
        """Tokens to compute in the next step, at most `limit`."""
        return limit

    def arrived(self, request: Request) -> None:
        """A request joined the queue."""

    def admitted(self, request: Request) -> None:
        """The request left the queue."""

    def planned(self, request: Request, tokens: int) -> None:
        """`tokens` of the request will be computed in the step being planned."""

    def left(self, request: Request) -> None:
        """A request ended."""

    def stepped(self, seconds: float, tokens: int, first_waits: list[float]) -> None:
        """A step of `tokens` tokens took `seconds`; `first_waits` are the times to first token it completed."""


class Batching(ABC):
    """Decides when waiting requests may join, and counts what a padded batch would compute for nothing."""

    beyond_budget = False
    """Whether requests join together even when the step's token budget cannot serve them all at once."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config

    @abstractmethod
    def admits(self, running: int, waiting: int, oldest_wait: float) -> bool:
        """Whether waiting requests may join in this step. `oldest_wait`: seconds the first of them has waited."""

    def joined(self, request: Request) -> None:
        """The request was admitted in the step being planned."""

    def padding(self, running: int) -> int:
        """Tokens of padding in a step while `running` requests run, after admission. Called once per planned step."""
        return 0


class PaddedBatching(Batching):
    """A batch that forms at once and runs until its last request ends, as rows of one left-padded tensor.

    Each prompt is padded to the longest of the batch, and each later step computes a token for every row, ended or not.
    """

    beyond_budget = True

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._prompts: list[int] = []
        self._forming = False

    @abstractmethod
    def ready(self, waiting: int, oldest_wait: float) -> bool:
        """Whether a batch of those that wait may start, when none runs."""

    def admits(self, running: int, waiting: int, oldest_wait: float) -> bool:
        self._forming = running == 0 and waiting > 0 and self.ready(waiting, oldest_wait)
        if self._forming:
            self._prompts = []
        return self._forming

    def joined(self, request: Request) -> None:
        # A preempted request that comes back brings its output along; it forms a batch of its own kind.
        self._prompts.append(len(request.tokens))

    def padding(self, running: int) -> int:
        if self._forming:
            self._forming = False
            return len(self._prompts) * max(self._prompts, default=0) - sum(self._prompts)
        return max(0, len(self._prompts) - running)
