"""What limits are made of: meters, what they read, and who keeps them.

A request is measured by several meters at once. It is admitted if all of them have room, and takes from all of them in
the same moment; a request that is refused takes from none. What it takes is what it could need at most. When it has
ended, what it did not need is given back.

Source: https://datatracker.ietf.org/doc/html/rfc2697 (token buckets)
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["DAY_S", "LEASE_RETRY_S", "MINUTE_S", "SLACK", "Kind", "Meter", "Quotas", "Reading", "Ticket", "Verdict"]

MINUTE_S = 60.0
DAY_S = 86_400.0
SLACK = 1e-6
"""Sums of fractions are not exact; so much is overlooked."""
LEASE_RETRY_S = 1.0
"""When to ask again where only the end of another request makes room."""


class Kind(enum.StrEnum):
    """How a meter fills up again."""

    BUCKET = "bucket"
    """Steadily, `limit` in a minute, and never above `limit`."""
    DAY = "day"
    """All at once, at midnight UTC."""
    LEASE = "lease"
    """When the request ends."""


@dataclasses.dataclass(frozen=True, slots=True)
class Meter:
    """One limit, and what a request takes of it."""

    name: str
    kind: Kind
    limit: float
    cost: float


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """A meter after a decision."""

    remaining: float
    reset_s: float
    """Until it is as full as it gets."""
    retry_s: float
    """Until there is room for the cost; 0 when there was."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ticket:
    """What was taken, to be settled when the request has ended."""

    key_id: str
    request_id: str
    meters: tuple[Meter, ...]
    day: int
    """The UTC day it was taken on, in days since 1970."""
    shared: bool = False
    """Whether it was counted together with other servers, rather than in this process."""


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request is admitted, and what its meters read now. Without a ticket it is refused."""

    ticket: Ticket | None
    readings: tuple[Reading, ...]


class Quotas(Protocol):
    """Who keeps the meters of all keys."""

    async def reserve(self, key_id: str, request_id: str, meters: Sequence[Meter]) -> Verdict:
        """Takes the cost of all meters, or, where one has no room, nothing."""

    def settle(self, ticket: Ticket, used: Mapping[str, float]) -> None:
        """Corrects what was taken to what was used, by name of the meter, and ends the leases. Does not block."""

    async def close(self) -> None:
        """Delivers what is under way."""
