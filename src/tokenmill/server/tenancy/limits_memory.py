"""Meters in the memory of this process. They are used from one event loop only, so a decision is not interrupted."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

from tokenmill.server.tenancy.quota import DAY_S, LEASE_RETRY_S, MINUTE_S, SLACK, Kind, Meter, Reading, Ticket, Verdict
from tokenmill.types import Clock

__all__ = ["MemoryQuotas"]


class MemoryQuotas:
    """Counts for one process. A restart forgets the counts.

    Args:
        clock: monotonic, so that setting the machine's clock changes no limit.
        now: seconds since 1970; read once, to know when the UTC day ends.
    """

    def __init__(self, clock: Clock = time.monotonic, now: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._epoch = now() - clock()
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._days: dict[tuple[str, str], _Day] = {}
        self._leases: dict[str, set[str]] = collections.defaultdict(set)

    async def reserve(self, key_id: str, request_id: str, meters: Sequence[Meter]) -> Verdict:
        now = self._clock()
        day, into_day = divmod(now + self._epoch, DAY_S)
        readings = [self._read(key_id, meter, now, int(day), DAY_S - into_day) for meter in meters]
        if any(reading.retry_s > 0 for reading in readings):
            return Verdict(None, tuple(readings))
        for meter in meters:
            match meter.kind:
                case Kind.BUCKET:
                    self._buckets[key_id, meter.name].available -= meter.cost
                case Kind.DAY:
                    self._days[key_id, meter.name].used += meter.cost
                case Kind.LEASE:
                    self._leases[key_id].add(request_id)
        ticket = Ticket(key_id, request_id, tuple(meters), int(day))
        free = [dataclasses.replace(meter, cost=0.0) for meter in meters]
        return Verdict(ticket, tuple(self._read(key_id, each, now, int(day), DAY_S - into_day) for each in free))

    def settle(self, ticket: Ticket, used: Mapping[str, float]) -> None:
        now = self._clock()
        for meter in ticket.meters:
            extra = used.get(meter.name, meter.cost) - meter.cost
            if meter.kind is Kind.BUCKET:
                bucket = self._buckets[ticket.key_id, meter.name]
                bucket.refill(now, meter.limit)
                bucket.available = min(meter.limit, bucket.available - extra)
            elif meter.kind is Kind.DAY:
                day = self._days[ticket.key_id, meter.name]
                if day.number == ticket.day:
                    day.used += extra
        self._leases[ticket.key_id].discard(ticket.request_id)

    async def close(self) -> None:
        """Nothing is under way."""

    def _read(self, key_id: str, meter: Meter, now: float, day: int, left_of_day: float) -> Reading:
        match meter.kind:
            case Kind.BUCKET:
                bucket = self._buckets.setdefault((key_id, meter.name), _Bucket(meter.limit, now))
                bucket.refill(now, meter.limit)
                per_unit = MINUTE_S / meter.limit
                short = meter.cost - bucket.available
                return Reading(
                    bucket.available,
                    (meter.limit - bucket.available) * per_unit,
                    short * per_unit if short > SLACK else 0.0,
                )
            case Kind.DAY:
                count = self._days.setdefault((key_id, meter.name), _Day(day))
                count.turn(day)
                left = meter.limit - count.used
                fits = left + SLACK >= meter.cost and left > 0
                return Reading(left, left_of_day, 0.0 if fits else left_of_day)
            case Kind.LEASE:
                left = meter.limit - len(self._leases[key_id])
                return Reading(left, 0.0, 0.0 if left >= meter.cost else LEASE_RETRY_S)


@dataclasses.dataclass(slots=True)
class _Bucket:
    available: float
    at: float

    def refill(self, now: float, limit: float) -> None:
        self.available = min(limit, self.available + (now - self.at) * limit / MINUTE_S)
        self.at = now


@dataclasses.dataclass(slots=True)
class _Day:
    number: int
    used: float = 0.0

    def turn(self, day: int) -> None:
        if day != self.number:
            self.number, self.used = day, 0.0
