"""Meters in Redis, for several servers that count together.

A decision is one script: one round trip, and nothing happens in between. Redis' own clock is used, so servers need not
agree on the time. Each key has a hash with its buckets and counts and a sorted set with its leases, in one slot of a
cluster. Both expire by themselves, and a lease does so soon after its server has died.

While Redis is away each server counts for itself, with the same limits: requests go on, and n servers together let
through at most n times as much. Refusing everything would make Redis a single point of failure for a service that does
not need it to answer.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tokenmill.errors import ConfigError, MissingDependencyError
from tokenmill.server.tenancy.quota import (
    DAY_S,
    LEASE_RETRY_S,
    MINUTE_S,
    SLACK,
    Kind,
    Meter,
    Quotas,
    Reading,
    Ticket,
    Verdict,
)
from tokenmill.types import Clock

__all__ = ["RedisQuotas"]

_logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
"""How long a connection, and then an answer, is waited for. A burst on a busy machine must not look like a failure."""
_AWAY_S = 1.0
"""How long Redis is left alone after it has failed."""
_CONNECTIONS = 8

_COMMON = f"""
local MINUTE, DAY, SLACK, LEASE_RETRY = {MINUTE_S}, {DAY_S}, {SLACK}, {LEASE_RETRY_S}
local hash, leases = KEYS[1], KEYS[2]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local day = math.floor(now / DAY)

local function number(field)
  return tonumber(redis.call('HGET', hash, field) or '')
end

local function write(field, value)
  redis.call('HSET', hash, field, string.format('%.17g', value))
end

local function available(name, limit)
  local level, at = number(name), number(name .. ':at')
  if not level or not at then return limit end
  return math.min(limit, level + math.max(0, now - at) * limit / MINUTE)
end

local function used(name)
  if number(name .. ':day') == day then return number(name) end
  return 0
end
"""

_RESERVE = (
    _COMMON
    + """
local request, lease_s = ARGV[1], tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', leases, '-inf', now)

local function read(name, kind, limit, cost)
  if kind == 'bucket' then
    local level = available(name, limit)
    local retry = 0
    if cost - level > SLACK then retry = (cost - level) * MINUTE / limit end
    return level, (limit - level) * MINUTE / limit, retry
  elseif kind == 'day' then
    local left, rest = limit - used(name), DAY - (now - day * DAY)
    if left + SLACK >= cost and left > 0 then return left, rest, 0 end
    return left, rest, rest
  end
  local left = limit - redis.call('ZCARD', leases)
  if left >= cost then return left, 0, 0 end
  return left, 0, LEASE_RETRY
end

local function each(action)
  for i = 3, #ARGV, 4 do
    action(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]))
  end
end

local admitted = 1
each(function(name, kind, limit, cost)
  local _, _, retry = read(name, kind, limit, cost)
  if retry > 0 then admitted = 0 end
end)
if admitted == 1 then
  each(function(name, kind, limit, cost)
    if kind == 'bucket' then
      write(name, available(name, limit) - cost)
      write(name .. ':at', now)
    elseif kind == 'day' then
      write(name, used(name) + cost)
      write(name .. ':day', day)
    else
      redis.call('ZADD', leases, string.format('%.17g', now + lease_s), request)
      redis.call('EXPIRE', leases, math.ceil(2 * lease_s))
    end
  end)
  redis.call('EXPIRE', hash, 2 * DAY)
end
local answer = {tostring(admitted), tostring(day)}
each(function(name, kind, limit, cost)
  if admitted == 1 then cost = 0 end
  for _, value in ipairs({read(name, kind, limit, cost)}) do
    table.insert(answer, string.format('%.17g', value))
  end
end)
return answer
"""
)

_SETTLE = (
    _COMMON
    + """
redis.call('ZREM', leases, ARGV[1])
for i = 3, #ARGV, 4 do
  local name, kind, limit, extra = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  if kind == 'bucket' and number(name) then
    write(name, math.min(limit, available(name, limit) - extra))
    write(name .. ':at', now)
  elseif kind == 'day' and tonumber(ARGV[2]) == number(name .. ':day') then
    write(name, number(name) + extra)
  end
end
"""
)

_RENEW = """
local time = redis.call('TIME')
local until_then = string.format('%.17g', time[1] + time[2] / 1000000 + ARGV[1])
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', until_then, ARGV[i]) end
redis.call('EXPIRE', KEYS[1], math.ceil(2 * ARGV[1]))
"""


class RedisQuotas:
    """Counts for all servers that use the same Redis.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        local: who counts while Redis is away.
        lease_s: how long a dead server's requests count as under way.

    Raises:
        ConfigError: ``invalid_option`` for another kind of URL.
        MissingDependencyError: without the package ``redis``.
    """

    def __init__(self, url: str, local: Quotas, lease_s: float = 30.0, clock: Clock = time.monotonic) -> None:
        try:
            import redis.asyncio
            import redis.asyncio.retry
            import redis.backoff
        except ModuleNotFoundError:
            raise MissingDependencyError("redis", "Counting limits in Redis", "redis") from None
        self._local = local
        self._lease_s = lease_s
        self._clock = clock
        self._errors = (redis.RedisError, OSError)
        # A script that was sent twice would count twice, so nothing is tried again behind our back.
        once = redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 0)
        try:
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                timeout=_TIMEOUT_S,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                retry=once,
            )
        except ValueError:
            raise ConfigError("invalid_option", "redis must be a URL like redis://host:6379/0.", "redis") from None
        self._client: Any = redis.asyncio.Redis(connection_pool=pool)
        self._reserve_script = self._client.register_script(_RESERVE)
        self._settle_script = self._client.register_script(_SETTLE)
        self._renew_script = self._client.register_script(_RENEW)
        self._away_until = float("-inf")
        self.away = False
        """Whether this process counts for itself now."""
        self._settling: dict[str, set[asyncio.Task[None]]] = collections.defaultdict(set)
        self._leases: dict[str, set[str]] = collections.defaultdict(set)
        self._renewing: asyncio.Task[None] | None = None

    async def reserve(self, key_id: str, request_id: str, meters: Sequence[Meter]) -> Verdict:
        if settling := self._settling.get(key_id):
            await asyncio.wait(settling)  # who asks again after an answer finds what that answer did not need
        arguments = [request_id, self._lease_s]
        for meter in meters:
            arguments += [meter.name, meter.kind.value, meter.limit, meter.cost]
        answer = await self._ask(self._reserve_script, _names(key_id), arguments)
        if answer is None:
            return await self._local.reserve(key_id, request_id, meters)
        admitted, day, *numbers = (float(each) for each in answer)
        readings = tuple(Reading(*numbers[i : i + 3]) for i in range(0, len(numbers), 3))
        if not admitted:
            return Verdict(None, readings)
        if any(meter.kind is Kind.LEASE for meter in meters):
            self._leases[key_id].add(request_id)
            if self._renewing is None:
                self._renewing = asyncio.create_task(self._renew())
        return Verdict(Ticket(key_id, request_id, tuple(meters), int(day), shared=True), readings)

    def settle(self, ticket: Ticket, used: Mapping[str, float]) -> None:
        """As the protocol says. If Redis is away, what was taken stays taken: it errs on the strict side, and heals."""
        if not ticket.shared:
            self._local.settle(ticket, used)
            return
        self._leases[ticket.key_id].discard(ticket.request_id)
        if not self._leases[ticket.key_id]:
            del self._leases[ticket.key_id]
        arguments: list[Any] = [ticket.request_id, ticket.day]
        for meter in ticket.meters:
            arguments += [meter.name, meter.kind.value, meter.limit, used.get(meter.name, meter.cost) - meter.cost]
        task = asyncio.ensure_future(self._settle(ticket.key_id, arguments))
        self._settling[ticket.key_id].add(task)

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        if pending := [task for tasks in self._settling.values() for task in tasks]:
            await asyncio.wait(pending)
        with contextlib.suppress(*self._errors):
            await self._client.aclose()
            await self._client.connection_pool.disconnect()

    async def _settle(self, key_id: str, arguments: list[Any]) -> None:
        try:
            await self._ask(self._settle_script, _names(key_id), arguments)
        finally:
            tasks = self._settling[key_id]
            tasks.discard(asyncio.current_task())
            if not tasks:
                del self._settling[key_id]

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            for key_id, requests in list(self._leases.items()):
                await self._ask(self._renew_script, _names(key_id)[1:], [self._lease_s, *requests])

    async def _ask(self, script: Any, names: Sequence[str], arguments: Sequence[Any]) -> Any:
        """What the script says; None when Redis is away."""
        if self.away:
            if self._clock() < self._away_until:
                return None
            # One request finds out whether Redis is back; until it knows, the others do not wait for the time-out too.
            self._away_until = self._clock() + 2 * _TIMEOUT_S
        try:
            answer = await script(keys=names, args=arguments)
        except self._errors as error:
            if not self.away:
                _logger.warning("Redis is away, so limits are counted by this server alone: %s", error)
            self._away_until = self._clock() + _AWAY_S
            self.away = True
            with contextlib.suppress(*self._errors):
                # The other connections that nobody uses now are as dead; they would be found so one by one.
                await self._client.connection_pool.disconnect(inuse_connections=False)
            return None
        if self.away:
            _logger.warning("Redis is back; limits are counted there again")
        self.away = False
        return () if answer is None else answer


def _names(key_id: str) -> tuple[str, str]:
    return f"tokenmill:limits:{{{key_id}}}", f"tokenmill:limits:{{{key_id}}}:leases"
