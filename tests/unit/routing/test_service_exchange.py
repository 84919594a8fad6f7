"""What replicas tell each other of the service of tenants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_ingress.routing.shares import ServiceExchange


def test_each_is_told_what_the_others_gave_once() -> None:
    exchange = ServiceExchange()
    for name in "abc":
        exchange.report(name, "1", {})
    exchange.report("a", "1", {"t": 10.0})
    exchange.report("b", "1", {"t": 5.0, "u": 1.0})
    assert exchange.take("a") == {"t": 5.0, "u": 1.0}
    assert exchange.take("b") == {"t": 10.0}
    assert exchange.take("c") == {"t": 15.0, "u": 1.0}
    assert exchange.take("c") == exchange.take("nobody") == {}


def test_who_joins_is_told_nothing_of_the_past() -> None:
    exchange = ServiceExchange()
    exchange.report("a", "1", {"t": 10.0})
    exchange.report("late", "1", {})
    assert exchange.take("late") == {}
    exchange.report("a", "1", {"t": 13.0})
    assert exchange.take("late") == {"t": 3.0}


def test_a_replica_that_started_again_counts_from_nothing() -> None:
    exchange = ServiceExchange()
    exchange.report("a", "1", {"t": 10.0})
    exchange.report("b", "1", {})
    exchange.report("a", "2", {"t": 4.0})
    assert exchange.take("b") == {"t": 4.0}
    exchange.forget("a")
    exchange.report("a", "2", {"t": 5.0})
    assert exchange.take("b") == {"t": 5.0}


def test_what_is_paid_back_is_not_given_twice() -> None:
    exchange = ServiceExchange()
    exchange.report("b", "1", {})
    for amount in (100.0, 80.0, 110.0):
        exchange.report("a", "1", {"t": amount})
    assert exchange.take("b") == {"t": 110.0}


def test_a_tenant_that_was_forgotten_begins_anew() -> None:
    exchange = ServiceExchange()
    exchange.report("b", "1", {})
    exchange.report("a", "1", {"t": 100.0})
    exchange.report("a", "1", {})
    exchange.report("a", "1", {"t": 7.0})
    assert exchange.take("b") == {"t": 107.0}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 50), st.booleans())))
def test_sums_agree_whatever_the_order(steps: list[tuple[int, int, int, bool]]) -> None:
    """In the end each has been told exactly what the others gave."""
    exchange = ServiceExchange()
    given_by = [dict.fromkeys("tuv", 0.0) for _ in range(3)]
    told = [dict.fromkeys("tuv", 0.0) for _ in range(3)]
    for place in range(3):
        exchange.report(str(place), "1", given_by[place])

    def take(place: int) -> None:
        for tenant, amount in exchange.take(str(place)).items():
            told[place][tenant] += amount

    for place, tenant, amount, takes in steps:
        given_by[place]["tuv"[tenant]] += amount
        exchange.report(str(place), "1", given_by[place])
        if takes:
            take(place)
    for place in range(3):
        take(place)
        for tenant in "tuv":
            others = sum(given_by[each][tenant] for each in range(3) if each != place)
            assert told[place][tenant] == pytest.approx(others)
