"""The bounded queue: what overload does to those who are let in, and what those hear who are not."""

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.config import build
from tokenmill.engine.admission import Admission, retry_after
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.errors import UnavailableError
from tokenmill.testing import FakeClock, FakeExecutor, fake_facts
from tokenmill.types import EngineRequest, FinishReason, SamplingParams

SECONDS_PER_TOKEN = 0.001
PROMPT, GENERATED, SEQS, WAITING = 8, 16, 8, 32


def request(name: str, now: float, **fields) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_token_ids=[1 + hash(name) % 90] * PROMPT, arrival=now,
        params=SamplingParams(max_tokens=GENERATED, ignore_eos=True), **fields,
    )  # fmt: skip


def engine(clock: FakeClock, **scheduler) -> Engine:
    config = build(EngineConfig, {"cache": {"prefix_caching": False}, "scheduler": scheduler})
    executor = FakeExecutor(fake_facts(num_blocks=200), clock=clock, seconds_per_token=SECONDS_PER_TOKEN)
    return Engine(config, executor, clock)


@pytest.mark.parametrize("policy", ["fcfs", "shortest_first", "fair_share"])
def test_three_times_the_load_leaves_the_latency_of_admitted_requests_bounded(policy):
    clock = FakeClock()
    served = engine(clock, policy=policy, max_num_seqs=SEQS, starvation_s=1.0)
    admission = Admission(served.scheduler, WAITING, clock)
    rng = random.Random(0)
    capacity = 1 / (SECONDS_PER_TOKEN * (PROMPT + GENERATED))  # requests a second
    count = 3000
    arrivals = deque()
    moment = 0.0
    for number in range(count):
        moment += rng.expovariate(3 * capacity)
        arrivals.append((moment, f"r{number}"))
    arrived: dict[str, float] = {}
    latency: dict[str, float] = {}
    refusals: list[UnavailableError] = []
    while arrivals or served.has_work:
        if not served.has_work and arrivals:
            clock.now = max(clock.now, arrivals[0][0])
        while arrivals and arrivals[0][0] <= clock.now:
            moment, name = arrivals.popleft()
            try:
                admission.check(request(name, moment))
            except UnavailableError as refused:
                refusals.append(refused)
                continue
            served.add(request(name, moment, tenant=f"t{len(arrived) % 5}"))
            arrived[name] = moment
        outputs = served.step()
        admission.ended(outputs)
        for output in outputs:
            if output.finish_reason is not None:
                assert output.request_id not in latency, "a request ended twice"
                latency[output.request_id] = clock.now - arrived[output.request_id]
    assert latency.keys() == arrived.keys(), "a request that was let in never ended"
    assert len(latency) + len(refusals) == count
    assert 0.6 < len(refusals) / count < 0.75  # two thirds of what comes is more than can be served
    # All that can be before a request when it is let in, and itself; twice that where others may overtake it.
    bound = (WAITING + SEQS + 1) / capacity * (1 if policy == "fcfs" else 2)
    assert max(latency.values()) < bound + 1.0 * (policy != "fcfs")
    assert {refused.code for refused in refusals} == {"queue_full"}
    assert all(1 <= refused.retry_after_s <= 60 for refused in refusals)


def test_further_completions_of_a_call_that_was_let_in_always_join():
    clock = FakeClock()
    served = engine(clock, max_num_seqs=1)
    admission = Admission(served.scheduler, 1, clock)
    served.add(request("first", 0.0))
    admission.check(request("second", 0.0, parent="first"))
    with pytest.raises(UnavailableError):
        admission.check(request("other", 0.0))
    assert [event.reason for event in served.events.of("other")] == ["queue_full"]


@given(
    waiting=st.integers(1, 5000), gaps=st.lists(st.floats(0, 10), max_size=64), since=st.floats(0, 100),
)  # fmt: skip
def test_the_time_to_come_back_is_sane_and_grows_with_the_queue(waiting, gaps, since):
    ends, now = deque(), 100.0
    for gap in gaps:
        now += gap
        ends.append(now)
    seconds = retry_after(waiting, ends, now + since)
    assert 1 <= seconds <= 60
    assert retry_after(waiting + 1, ends, now + since) >= seconds
    assert retry_after(waiting, ends, now + since + 1) >= seconds  # while nothing ends it takes longer


def test_the_time_to_come_back_is_that_of_the_queue():
    ends = deque(100 + 0.5 * number for number in range(10))  # two a second
    assert retry_after(20, ends, 105.0) == pytest.approx(10.0)


def test_deadlines_end_requests_wherever_they_are_and_cost_nothing_else():
    clock = FakeClock()
    served = engine(clock, max_num_seqs=1)
    served.add(request("running", 0.0, deadline=0.012))
    served.add(request("waiting", 0.0, deadline=0.011))
    served.add(request("patient", 0.0, deadline=1000.0))
    ended = {}
    while served.has_work:
        for output in served.step():
            if output.finish_reason is not None:
                ended[output.request_id] = output
    assert list(ended) == ["waiting", "running", "patient"]
    for name in ("running", "waiting"):
        assert (ended[name].finish_reason, ended[name].error.code) == (FinishReason.ERROR, "deadline_exceeded")
    assert ended["patient"].finish_reason is FinishReason.LENGTH
    assert served.stats().blocks_used == 0


def test_a_deadline_does_not_reach_a_later_request_of_the_same_name():
    clock = FakeClock()
    served = engine(clock)
    served.add(request("same", 0.0, deadline=0.5))
    served.abort(["same"])
    served.add(request("same", 0.0))
    clock.advance(1.0)
    outputs = served.step()
    assert [output.error for output in outputs] == [None]


def test_a_deadline_that_passes_while_nothing_can_run_is_reported():
    clock = FakeClock()
    served = engine(clock, batching="dynamic", batch_wait_ms=1e6)
    served.add(request("waiting", 0.0, deadline=0.5))
    assert served.step() == []
    clock.advance(1.0)
    assert [output.error.code for output in served.step()] == ["deadline_exceeded"]
