"""Meters in memory and in a real Redis: the same arithmetic, exact under bursts, and what happens without Redis."""

import asyncio
import collections
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.errors import ConfigError
from tokenmill.server.tenancy.limits_memory import MemoryQuotas
from tokenmill.server.tenancy.limits_redis import RedisQuotas
from tokenmill.server.tenancy.quota import DAY_S, Kind, Meter

REQUESTS = Meter("requests", Kind.BUCKET, 5, 1)
TOKENS = Meter("tokens", Kind.BUCKET, 1000, 100)
SEATS = Meter("concurrency", Kind.LEASE, 3, 1)
DAILY = Meter("tokens_per_day", Kind.DAY, 700, 100)


class Clock:
    def __init__(self, time=0.0):
        self.time = time

    def __call__(self):
        return self.time


@pytest.fixture(params=["memory", "redis"])
async def quotas(request):
    """Counters that nobody has used."""
    made = MemoryQuotas()
    if request.param == "redis":
        made = RedisQuotas(request.getfixturevalue("redis_server").url, made)
        await made._client.flushall()
    yield made
    await made.close()


async def admitted(quotas, meters, count, key="k"):
    verdicts = await asyncio.gather(*(quotas.reserve(key, f"r{i}", meters) for i in range(count)))
    return [verdict.ticket for verdict in verdicts if verdict.ticket is not None]


@pytest.mark.parametrize(("meter", "allowed"), [(REQUESTS, 5), (SEATS, 3), (DAILY, 7), (TOKENS, 10)])
async def test_of_200_requests_at_once_exactly_as_many_pass_as_the_limit_says(quotas, meter, allowed):
    assert len(await admitted(quotas, [meter], 200)) == allowed


async def test_a_request_that_is_refused_takes_nothing_from_any_meter(quotas):
    seats = await admitted(quotas, [TOKENS, SEATS, DAILY], 200)
    assert len(seats) == 3
    assert len(await admitted(quotas, [DAILY], 200)) == 4
    assert len(await admitted(quotas, [TOKENS], 200)) == 7


async def test_keys_do_not_share(quotas):
    assert len(await admitted(quotas, [REQUESTS], 10, "a")) == 5
    assert len(await admitted(quotas, [REQUESTS], 10, "b")) == 5


async def test_what_was_not_used_is_given_back_and_a_seat_is_free_again(quotas):
    for ticket in await admitted(quotas, [TOKENS, SEATS, DAILY], 3):
        quotas.settle(ticket, {"tokens": 0, "tokens_per_day": 50})
    assert len(await admitted(quotas, [SEATS], 200)) == 3
    assert len(await admitted(quotas, [DAILY], 200)) == 5  # 700 - 3 * 50 = 550
    assert len(await admitted(quotas, [TOKENS], 200)) == 10


async def test_more_than_was_taken_leaves_a_debt(quotas):
    [ticket] = await admitted(quotas, [TOKENS], 1)
    quotas.settle(ticket, {"tokens": 1500})
    verdict = await quotas.reserve("k", "next", [TOKENS])
    assert verdict.ticket is None
    assert verdict.readings[0].remaining == pytest.approx(-500, abs=5)
    assert verdict.readings[0].retry_s == pytest.approx(600 / 1000 * 60, abs=0.5)


async def test_an_answer_tells_what_is_left_and_when_there_is_more(quotas):
    verdict = await quotas.reserve("k", "r", [REQUESTS, SEATS, DAILY])
    requests, seats, daily = verdict.readings
    assert requests.remaining == pytest.approx(4, abs=0.01)
    assert requests.reset_s == pytest.approx(12, abs=0.1)
    assert (seats.remaining, daily.remaining) == (2, 600)
    assert 0 < daily.reset_s <= DAY_S
    refused = (await quotas.reserve("k", "r2", [Meter("tokens_per_day", Kind.DAY, 700, 650)])).readings[0]
    assert (refused.remaining, refused.retry_s) == (600, refused.reset_s)


async def test_a_budget_that_is_used_up_refuses_what_costs_nothing_beforehand(quotas):
    free = Meter("dollars_per_day", Kind.DAY, 0.5, 0.0)
    [ticket] = await admitted(quotas, [free], 1)
    quotas.settle(ticket, {"dollars_per_day": 0.5})
    assert await admitted(quotas, [free], 1) == []


async def test_settling_ends_the_seat_of_its_own_request_only(quotas):
    first, _, _ = await admitted(quotas, [SEATS], 3)
    quotas.settle(first, {})
    assert (await quotas.reserve("k", "next", [SEATS])).ticket
    assert (await quotas.reserve("k", "one more", [SEATS])).ticket is None


class Reference:
    """A bucket as a child would do it: a level, and time that passes in between."""

    def __init__(self, limit):
        self.limit, self.level = limit, float(limit)

    def wait(self, seconds):
        self.level = min(self.limit, self.level + seconds * self.limit / 60)

    def take(self, cost):
        if self.level + 1e-6 < cost:
            return False
        self.level -= cost
        return True

    def give(self, amount):
        self.level = min(self.limit, self.level + amount)


STEPS = st.lists(
    st.tuples(st.integers(0, 300), st.floats(0, 90), st.floats(0, 1.5)), max_size=60
)  # cost, seconds before, what part of the cost is used


@given(limit=st.integers(1, 300), steps=STEPS)
@settings(max_examples=200, deadline=None)
def test_a_bucket_agrees_with_the_plain_reference(limit, steps):
    async def run():
        clock, reference = Clock(), Reference(limit)
        quotas = MemoryQuotas(clock, now=lambda: 0.0)
        for number, (cost, seconds, part) in enumerate(steps):
            clock.time += seconds
            reference.wait(seconds)
            verdict = await quotas.reserve("k", str(number), [Meter("tokens", Kind.BUCKET, limit, cost)])
            assert (verdict.ticket is not None) == reference.take(cost)
            assert verdict.readings[0].remaining == pytest.approx(reference.level, abs=1e-5)
            if verdict.ticket is None:
                assert verdict.readings[0].retry_s == pytest.approx((cost - reference.level) * 60 / limit, abs=1e-5)
            else:
                quotas.settle(verdict.ticket, {"tokens": cost * part})
                reference.give(cost - cost * part)

    asyncio.run(run())


@given(limit=st.integers(1, 100), steps=STEPS)
@settings(max_examples=100, deadline=None)
def test_in_any_time_no_more_passes_than_a_full_bucket_and_what_flowed_in(limit, steps):
    async def run():
        clock, passed = Clock(), []
        quotas = MemoryQuotas(clock, now=lambda: 0.0)
        for number, (cost, seconds, _) in enumerate(steps):
            clock.time += seconds
            if (await quotas.reserve("k", str(number), [Meter("tokens", Kind.BUCKET, limit, cost)])).ticket:
                passed.append((clock.time, cost))
        for i, (begin, _) in enumerate(passed):
            for j in range(i, len(passed)):
                span = passed[j][0] - begin
                assert sum(cost for _, cost in passed[i : j + 1]) <= limit * (1 + span / 60) + 1e-3

    asyncio.run(run())


@given(steps=st.lists(st.tuples(st.integers(0, 30), st.floats(0, 40_000), st.booleans()), max_size=40))
@settings(max_examples=100, deadline=None)
def test_on_no_day_is_more_used_than_the_day_s_limit(steps):
    async def run():
        clock, used = Clock(), collections.Counter()
        quotas = MemoryQuotas(clock, now=lambda: 0.0)
        open_tickets = []
        for number, (cost, seconds, settle) in enumerate(steps):
            clock.time += seconds
            verdict = await quotas.reserve("k", str(number), [Meter("tokens_per_day", Kind.DAY, 50, cost)])
            if verdict.ticket:
                open_tickets.append((verdict.ticket, cost))
                used[verdict.ticket.day] += cost
            if settle and open_tickets:  # perhaps on a later day: then it changes the earlier one
                ticket, cost = open_tickets.pop(0)
                quotas.settle(ticket, {"tokens_per_day": cost / 2})
                used[ticket.day] -= cost - cost / 2
            assert all(amount <= 50 for amount in used.values())

    asyncio.run(run())


async def test_setting_the_machine_s_clock_moves_no_limit_in_memory():
    clock, wall = Clock(1000.0), Clock(5 * DAY_S - 10)
    quotas = MemoryQuotas(clock, wall)
    assert len(await admitted(quotas, [REQUESTS, DAILY], 10)) == 5
    for jump, left in ((400 * DAY_S, 100), (-400 * DAY_S, 0)):
        wall.time += jump
        assert await admitted(quotas, [REQUESTS], 10) == []
        assert (await quotas.reserve("k", "r", [DAILY])).readings[0].remaining == left
    clock.time += 12  # one request flows in, and it is the next day
    assert len(await admitted(quotas, [REQUESTS], 10)) == 1
    assert len(await admitted(quotas, [DAILY], 10)) == 7


# Redis alone

CLIENT = """
import asyncio, json, sys
from tokenmill.server.tenancy.limits_memory import MemoryQuotas
from tokenmill.server.tenancy.limits_redis import RedisQuotas
from tokenmill.server.tenancy.quota import Kind, Meter
async def main(url, name):
    quotas = RedisQuotas(url, MemoryQuotas())
    meters = [Meter("requests", Kind.BUCKET, 40, 1), Meter("tokens_per_day", Kind.DAY, 10_000, 300),
              Meter("concurrency", Kind.LEASE, 37, 1)]
    sys.stdin.read()
    verdicts = await asyncio.gather(*(quotas.reserve("k", f"{name}-{i}", meters) for i in range(200)))
    print(json.dumps([sum(v.ticket is not None for v in verdicts), quotas.away]))
asyncio.run(main(*sys.argv[1:]))
"""


async def test_several_servers_together_let_through_what_one_would(redis_server):
    quotas = RedisQuotas(redis_server.url, MemoryQuotas())
    await quotas._client.flushall()
    command = [sys.executable, "-c", CLIENT, redis_server.url]
    clients = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for i in range(3)
    ]
    for client in clients:
        client.stdin.close()
    passed, away = zip(*[json.loads(client.stdout.read()) for client in clients], strict=True)
    assert [client.wait() for client in clients] == [0, 0, 0]
    assert not any(away)
    assert sum(passed) == 33  # 10,000 tokens a day at 300 each: the strictest of the three
    verdict = await quotas.reserve("k", "r", [Meter("tokens_per_day", Kind.DAY, 10_000, 101)])
    assert verdict.readings[0].remaining == 100
    assert (await quotas.reserve("k", "r", [Meter("concurrency", Kind.LEASE, 37, 1)])).readings[0].remaining == 3
    await quotas.close()


@given(limit=st.integers(1, 300), steps=st.lists(st.tuples(st.integers(0, 300), st.floats(0, 1.5)), max_size=12))
@settings(max_examples=30, deadline=None)
def test_redis_and_memory_decide_alike(redis_server, limit, steps):
    async def run():
        clock = Clock()
        memory, shared = MemoryQuotas(clock, now=lambda: 0.0), RedisQuotas(redis_server.url, MemoryQuotas())
        await shared._client.flushall()
        for number, (cost, part) in enumerate(steps):
            meters = [Meter("tokens_per_day", Kind.DAY, 3 * limit, cost), Meter("concurrency", Kind.LEASE, 2, 1)]
            ours, theirs = [await each.reserve("k", str(number), meters) for each in (memory, shared)]
            assert (ours.ticket is None) == (theirs.ticket is None)
            assert [reading.remaining for reading in ours.readings] == pytest.approx(
                [reading.remaining for reading in theirs.readings]
            )
            if ours.ticket and number % 2:
                memory.settle(ours.ticket, {"tokens_per_day": cost * part})
                shared.settle(theirs.ticket, {"tokens_per_day": cost * part})
        await shared.close()

    asyncio.run(run())


async def _answer_of_redis(quotas):
    """Asks until Redis counts again; what was asked in vain costs nothing there."""
    while (verdict := await quotas.reserve("probe", "r", [SEATS])).ticket is None or not verdict.ticket.shared:
        if verdict.ticket:
            quotas.settle(verdict.ticket, {})
        quotas._clock.time += 1
    quotas.settle(verdict.ticket, {})


async def test_while_redis_is_away_each_server_holds_the_limits_by_itself(redis_server, caplog):
    quotas = RedisQuotas(redis_server.url, MemoryQuotas(), clock=Clock())
    await quotas._client.flushall()
    [before, *_] = await admitted(quotas, [DAILY], 3)
    redis_server.stop()
    try:
        quotas.settle(before, {"tokens_per_day": 0})  # cannot be delivered; nobody notices
        local = await admitted(quotas, [DAILY], 200)
        assert len(local) == 7
        assert not any(ticket.shared for ticket in local)
        assert quotas.away
        assert caplog.text.count("Redis is away") == 1
    finally:
        redis_server.start()
    await _answer_of_redis(quotas)  # without a restart
    assert not quotas.away
    assert "Redis is back" in caplog.text
    quotas.settle(local[0], {"tokens_per_day": 0})  # goes back to where it was taken
    assert len(await admitted(quotas, [DAILY], 200)) == 4  # three were taken before; they were kept on disk
    assert len(quotas._local._days) == 1
    await quotas.close()


async def test_a_redis_that_hangs_holds_up_one_request_and_not_those_after_it(redis_server, monkeypatch):
    monkeypatch.setattr("tokenmill.server.tenancy.limits_redis._TIMEOUT_S", 0.2)
    clock = Clock()
    quotas = RedisQuotas(redis_server.url, MemoryQuotas(), clock=clock)
    await quotas._client.flushall()
    with redis_server.frozen():
        assert (await quotas.reserve("k", "first", [DAILY])).ticket.shared is False
        clock.time += 1  # now it may be asked again
        probe = asyncio.ensure_future(quotas.reserve("k", "probe", [DAILY]))
        await asyncio.sleep(0)
        others = await admitted(quotas, [DAILY], 3)
        assert not probe.done()  # nobody waited for it
        assert [ticket.shared for ticket in others] == [False] * 3
        assert (await probe).ticket.shared is False
    clock.time += 1
    assert (await quotas.reserve("k", "after", [DAILY])).ticket.shared
    await quotas.close()


async def test_a_redis_that_lost_everything_learns_the_scripts_again(redis_server):
    quotas = RedisQuotas(redis_server.url, MemoryQuotas())
    await quotas._client.flushall()
    assert len(await admitted(quotas, [DAILY], 10)) == 7
    await quotas._client.script_flush()
    await quotas._client.flushall()
    assert len(await admitted(quotas, [DAILY], 10)) == 7
    assert not quotas.away
    await quotas.close()


async def test_the_seats_of_a_server_that_died_become_free_and_those_of_a_living_one_do_not(redis_server):
    dead = RedisQuotas(redis_server.url, MemoryQuotas(), lease_s=0.3)
    alive = RedisQuotas(redis_server.url, MemoryQuotas(), lease_s=0.3)
    await alive._client.flushall()
    assert (await dead.reserve("k", "dead", [SEATS])).ticket
    assert len(await admitted(alive, [SEATS], 2)) == 2
    dead._renewing.cancel()
    while (await alive.reserve("k", "new", [SEATS])).ticket is None:
        await asyncio.sleep(0.02)
    assert await alive._client.zrange("tokenmill:limits:{k}:leases", 0, -1) != []
    members = {member.decode() for member in await alive._client.zrange("tokenmill:limits:{k}:leases", 0, -1)}
    assert members == {"r0", "r1", "new"}
    await dead.close()
    await alive.close()


async def test_what_is_in_redis_expires_by_itself(redis_server):
    quotas = RedisQuotas(redis_server.url, MemoryQuotas())
    await quotas._client.flushall()
    await quotas.reserve("k", "r", [REQUESTS, TOKENS, SEATS, DAILY])
    names = await quotas._client.keys("*")
    assert len(names) == 2
    assert all([0 < await quotas._client.ttl(name) <= 2 * DAY_S for name in names])
    await quotas.close()


async def test_a_decision_is_one_round_trip(redis_server):
    quotas = RedisQuotas(redis_server.url, MemoryQuotas())
    await quotas._client.flushall()
    await admitted(quotas, [DAILY], 1)
    before = (await quotas._client.info("commandstats"))["cmdstat_evalsha"]["calls"]
    await quotas.reserve("k", "r", [REQUESTS, TOKENS, SEATS, DAILY])
    after = (await quotas._client.info("commandstats"))["cmdstat_evalsha"]["calls"]
    assert after - before == 1
    await quotas.close()


async def test_who_asks_at_once_after_an_answer_finds_the_seat_free(redis_server):
    quotas = RedisQuotas(redis_server.url, MemoryQuotas())
    await quotas._client.flushall()
    one = Meter("concurrency", Kind.LEASE, 1, 1)
    for number in range(50):
        verdict = await quotas.reserve("k", str(number), [one])
        assert verdict.ticket is not None
        quotas.settle(verdict.ticket, {})
    await quotas.close()


@pytest.mark.parametrize("url", ["localhost:6379", "http://x", "redis"])
def test_what_is_no_address_of_redis_is_refused(url):
    with pytest.raises(ConfigError) as caught:
        RedisQuotas(url, MemoryQuotas())
    assert caught.value.field == "redis"
