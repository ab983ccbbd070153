"""What a request costs, by tokens and by its share of the machine's time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.server.tenancy.costs import MachineTime, Prices


class Clock:
    time = 0.0

    def __call__(self):
        return self.time


def test_tokens_cost_by_the_million():
    assert Prices(per_million_input=2.0, per_million_output=8.0).cost(1000, 500, 99.0) == pytest.approx(0.006)


def test_an_hour_of_the_machine_costs_its_price_and_both_prices_add_up():
    assert Prices(per_hour=3.6).cost(1000, 500, 3600) == pytest.approx(3.6)
    assert Prices(3.6, 1.0, 1.0).cost(1_000_000, 1_000_000, 1800) == pytest.approx(1.8 + 2)


def test_of_a_second_with_several_requests_each_pays_its_part():
    clock = Clock()
    machine = MachineTime(clock)
    machine.enter("a")
    clock.time = 2.0  # a alone
    machine.enter("b")
    clock.time = 6.0  # both
    assert machine.leave("a") == pytest.approx(4.0)
    clock.time = 7.0  # b alone
    assert machine.leave("b") == pytest.approx(3.0)
    clock.time = 100.0  # nobody
    machine.enter("c")
    assert machine.leave("c") == 0.0


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 100)), max_size=60))
def test_together_they_pay_the_time_in_which_there_was_somebody(steps):
    clock, inside, paid, busy = Clock(), set(), 0.0, 0.0
    machine = MachineTime(clock)
    for who, seconds in steps:
        clock.time += seconds
        busy += seconds if inside else 0.0
        if who in inside:
            inside.remove(who)
            paid += machine.leave(str(who))
        else:
            inside.add(who)
            machine.enter(str(who))
    paid += sum(machine.leave(str(who)) for who in inside)
    assert paid == pytest.approx(busy, abs=1e-6)
