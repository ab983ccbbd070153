"""What a request costs.

Two prices can be set, and they add up: one for tokens, and one for the machine by the hour. The hour is shared by the
requests that are in the server: of each moment everyone who is there pays an equal part, so that what all requests pay
together is exactly the price of the time in which there was at least one. Waiting counts, because somebody waits only
when the machine is full; time in which nobody was there is charged to nobody.
"""

from __future__ import annotations

import dataclasses
import time

from tokenmill.types import Clock

__all__ = ["FREE", "MachineTime", "Prices"]


@dataclasses.dataclass(frozen=True)
class Prices:
    """Prices in dollars."""

    per_hour: float = 0.0
    per_million_input: float = 0.0
    per_million_output: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int, machine_s: float) -> float:
        """Dollars of a request: its tokens at their prices, and its share of the machine's time.

        Args:
            prompt_tokens: all of them; those from the cache cost the same.
            machine_s: seconds of the machine, from `MachineTime`.
        """
        tokens = prompt_tokens * self.per_million_input + completion_tokens * self.per_million_output
        return tokens / 1e6 + machine_s * self.per_hour / 3600


FREE = Prices()


class MachineTime:
    """Shares the machine's time between the requests that are in the server.

    Of every second with n requests each gets 1/n. The sum of 1/n over time is the same for all, so it is kept once, and
    a request's share is how far it grew while the request was there.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self._share = 0.0
        self._since: dict[str, float] = {}

    def enter(self, request_id: str) -> None:
        """A request has come."""
        self._advance()
        self._since[request_id] = self._share

    def leave(self, request_id: str) -> float:
        """A request that had come has gone; returns its seconds of the machine."""
        self._advance()
        return self._share - self._since.pop(request_id)

    def _advance(self) -> None:
        now = self._clock()
        if self._since:
            self._share += (now - self._at) / len(self._since)
        else:
            self._share = 0.0  # nobody remembers it, and small numbers are exact
        self._at = now
